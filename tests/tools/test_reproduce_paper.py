"""The reproduction of the paper's tables, in miniature: every step a real command, done once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, environment

ROWS = {"base", "reference alone", "plain", "plain, step 2", "plain, step 4", "plain, step 6", "goldfish 25 %", "dual",
        "dual, cross-fitted"}  # fmt: skip


def reproduce(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/reproduce_paper.py", "--scale", "smoke", "--folder", str(folder), "--jobs", "2"]
    return subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_row_is_trained_attacked_and_put_beside_the_papers(tmp_path: Path) -> None:
    first = reproduce(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    results = json.loads((tmp_path / "results.json").read_text())["sotu"]
    assert results.keys() == ROWS
    for row in results.values():
        assert {"perplexity", "strongest", "loss", "ref", "min_k", "zlib", "ref_classifier", "ref_forest"} <= row.keys()
    assert results["plain"]["perplexity"][0] < results["base"]["perplexity"][0], "plain training learned nothing"
    assert results["plain"]["perplexity"] != results["plain, step 2"]["perplexity"]
    table = (tmp_path / "results.md").read_text()
    assert f"| plain | 1 | {results['plain']['perplexity'][0]:.1f} (12.729) |" in table
    assert (tmp_path / "trade-off-sotu.svg").stat().st_size > 1000

    steps = len(list(tmp_path.glob("*/done/*")))
    (tmp_path / "sotu-0" / "done" / "audit").unlink()  # as if it had been stopped there
    again = reproduce(tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.startswith(f"[{steps}/{steps}] sotu-0/audit"), "a step was done again"
    assert json.loads((tmp_path / "results.json").read_text())["sotu"] == results


@pytest.mark.slow
def test_a_failed_step_ends_the_tool_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "base-sotu").mkdir()
    (tmp_path / "base-sotu" / "data").write_text("a file where a folder must be")
    outcome = reproduce(tmp_path)
    assert outcome.returncode == 1
    assert "base-sotu/prepare failed with status 2; see" in outcome.stderr
    assert (tmp_path / "base-sotu" / "logs" / "prepare.log").is_file()
