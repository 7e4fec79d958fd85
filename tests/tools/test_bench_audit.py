"""tools/bench_audit.py in miniature: both passes run on the same blocks, and there is a ratio for each vocabulary."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.support import ROOT, environment, python, succeed

TINY = ["--hidden", "64", "--layers", "1", "--block-length", "64", "--blocks", "8", "--pairs", "1", "--passages", "100"]


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        python("tools/bench_audit.py", *TINY, *arguments),
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_the_audits_pass_is_compared_with_a_bare_one() -> None:
    output = succeed(run_tool("--vocabularies", "8192", "9000"))
    found = re.findall(r"([\d,]+) ids: audit's pass / bare forward pass: \S+ / \S+ tokens/s = ([\d.]+)", output)
    assert [ids for ids, _ in found] == ["8,192", "9,000"], output
    # So small a model has little but its vocabulary; what the larger ones lose is in docs/results/speed.md.
    assert all(0.05 < float(ratio) < 5 for _, ratio in found), output


@pytest.mark.slow
def test_a_vocabulary_that_the_blocks_do_not_fit_is_refused() -> None:
    result = run_tool("--vocabularies", "300")
    assert result.returncode == 2
    assert re.search(r"--vocabularies: the corpus has \d+ ids; give no fewer", result.stderr)
