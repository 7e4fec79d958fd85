"""tools/bench_audit_statistics.py and tools/check_null.py in miniature."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.support import ROOT, environment, python, succeed

SMALL = ["--documents", "60", "--tokens", "12"]


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        python(f"tools/{name}.py", *arguments),
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_two_checkouts_are_compared() -> None:
    arguments = ["--baseline", str(ROOT), "--pairs", "1", "--models", "1", *SMALL]
    output = succeed(run_tool("bench_audit_statistics", *arguments))
    found = re.search(r"1 models, 60 \+ 60 documents of 12 tokens: .* s of processor time = ([\d.]+)", output)
    assert found is not None, output
    assert 0.1 < float(found[1]) < 10


@pytest.mark.slow
def test_growth_is_measured_on_files() -> None:
    output = succeed(run_tool("bench_audit_statistics", "--scale", *SMALL))
    found = re.search(r"60 documents: [\d.]+ s, [\d.]+ s of processor time, ([\d.]+) GiB, (\d+) attacks", output)
    assert found is not None, output
    assert 0.05 < float(found[1]) < 10
    assert int(found[2]) >= 15
    assert "give --baseline PATH or --scale" in run_tool("bench_audit_statistics").stderr


@pytest.mark.slow
def test_audits_of_nothing_are_counted() -> None:
    output = succeed(run_tool("check_null", "--audits", "3", "--documents", "30", "--tokens", "12"))
    assert re.search(r"^interval above \.5: 0 of 3 audits = 0\.000 \[0\.000, 0\.708\]$", output, re.MULTILINE), output
    assert re.search(r"^collections with p of at most \.05: [\d.]+ of \d+$", output, re.MULTILINE)
