"""The planner against published throughput, and against resident memory in miniature."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, environment, succeed


def check_plan(*arguments: str) -> str:
    return succeed(
        subprocess.run(
            [sys.executable, "tools/check_plan.py", *arguments], env=environment(PYTHONPATH=str(ROOT)), cwd=ROOT,
            capture_output=True, text=True, timeout=600, check=False,
        )
    )  # fmt: skip


def test_planned_speed_is_within_a_fifth_of_what_was_published() -> None:
    output = check_plan("speed", "--markdown")
    rows = re.findall(r"^\| (\S+) \| .* \| ([+-][\d.]+)% \| ", output, re.MULTILINE)
    assert len(rows) == 46
    assert all(abs(float(error)) <= 20 for _, error in rows)
    assert "7b, not fitted: 10 rows" in output
    assert "torchtitan, not fitted: 4 rows" in output


@pytest.mark.slow
def test_planned_memory_is_near_what_ranks_hold(tmp_path: Path) -> None:
    """9 million parameters, of which a rank holds 80 MiB and more; what libraries take beside them weighs more here."""
    output = check_plan("memory", "--size", "small", "--layout", "zero2", "--out", str(tmp_path / "figures.json"))
    found = re.search(r"planned / measured ([\d.]+)", output)
    assert found, output
    assert 0.7 < float(found[1]) < 1.15
    assert (tmp_path / "figures.json").is_file()
