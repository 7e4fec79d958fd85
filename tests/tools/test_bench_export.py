"""The export benchmark, in miniature."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.support import ROOT, environment, python


@pytest.mark.slow
def test_export_stays_within_its_bound() -> None:
    result = subprocess.run(
        python("tools/bench_export.py", "--parameters", "6", "--mebibytes", "8"),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = re.search(r"grew by ([\d.]+) GiB, bound ([\d.]+) GiB", result.stdout)
    assert found is not None, result.stdout
    assert float(found[1]) < float(found[2])
