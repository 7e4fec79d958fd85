"""One launch of two ranks that gives all measured figures."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.plan.support import CASES, LLAMA
from tests.support import ROOT, command, environment


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what the engines of CASES hold and send."""
    folder = tmp_path_factory.mktemp("measured")
    given = folder / "cases.json"
    given.write_text(json.dumps({"cases": CASES, "shape": LLAMA}))
    result = subprocess.run(
        command("tests.plan.measure_states", given, ranks=2),
        env=environment(LOCAL_SIZE="2"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found: list[dict[str, Any]] = json.loads((folder / "measured.json").read_text())
    return found
