"""The benchmark of starting times: every command is measured, and one that ends otherwise than it should is told."""

from __future__ import annotations

import re
import subprocess

from tests.support import ROOT, environment, python, succeed


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        python("tools/bench_startup.py", "--pairs", "1", *arguments),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_command_is_measured() -> None:
    output = succeed(run_tool())
    found = {
        label: float(ratio) for label, ratio in re.findall(r"^(\w+): .* = ([\d.]+) \(median", output, re.MULTILINE)
    }
    assert found.keys() == {"missing", "typo", "status", "plan"}
    assert all(ratio > 0 for ratio in found.values())


def test_a_command_that_fails_is_told() -> None:
    result = run_tool("--only", "plan", "--run", "no_such_run")
    assert result.returncode == 1
    assert "ended with status 2, not 0" in result.stderr
