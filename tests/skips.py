"""With ``DUALTOK_REQUIRE_ALL=1`` a test that is skipped has failed: a green run has then run everything.

For machines that can install what tests need, such as CI's, where a missing package would otherwise go unnoticed.
Tests marked ``optional`` may be skipped even there.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure that gives the reason of the skip."""
    report = yield
    asked = os.environ.get("DUALTOK_REQUIRE_ALL", "") not in ("", "0")
    if asked and report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("optional") is None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{reason.removeprefix('Skipped: ')}; DUALTOK_REQUIRE_ALL lets no test be left out"
    return report
