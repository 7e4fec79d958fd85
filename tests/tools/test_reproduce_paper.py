"""The reproduction of the paper's tables, in miniature: every step a real command, done once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, environment

ROWS = {"base", "reference alone", "plain", "plain, step 2", "plain, step 4", "plain, step 6", "goldfish 25 %",
        "DP-SGD (8, 1e-05)", "dual", "dual, cross-fitted"}  # fmt: skip
PLAN = """
import reproduce_paper
scale = reproduce_paper.SCALES[sys.argv[1]]
steps = reproduce_paper.plan(scale, Path(sys.argv[2]), list(reproduce_paper.PARTS), None)[1]
names = {step.name for step in steps}
missing = {need for step in steps for need in step.needs if need not in names}
print(json.dumps([len(names), sorted(missing), sorted({step.arguments[0] for step in steps})]))
"""


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
    (tmp_path / "sotu-0" / "done" / "audit-headline").unlink()  # as if it had been stopped there
    again = reproduce(tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.startswith(f"[{steps}/{steps}] sotu-0/audit-headline"), "a step was done again"
    assert json.loads((tmp_path / "results.json").read_text())["sotu"] == results


@pytest.mark.slow
def test_a_failed_step_ends_the_tool_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "base-sotu").mkdir()
    (tmp_path / "base-sotu" / "data").write_text("a file where a folder must be")
    outcome = reproduce(tmp_path)
    assert outcome.returncode == 1
    assert "base-sotu/prepare failed with status 2; see" in outcome.stderr
    assert (tmp_path / "base-sotu" / "logs" / "prepare.log").is_file()


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
def test_the_steps_of_every_part_have_sound_settings_and_needs(tmp_path: Path, scale: str) -> None:
    """Every run file is parsed as it is written; what a step needs is a step."""
    program = f"import json, sys; from pathlib import Path; sys.path.insert(0, 'tools')\n{PLAN}"
    planned = subprocess.run(
        [sys.executable, "-c", program, scale, str(tmp_path)], env=environment(), cwd=ROOT, capture_output=True,
        text=True, timeout=120, check=True,
    )  # fmt: skip
    count, missing, verbs = json.loads(planned.stdout)
    assert count == {"smoke": 113, "cpu": 298}[scale]
    assert missing == []
    assert verbs == ["audit", "export", "prepare", "retreat", "score", "tools/paper/dynamics.py", "train"]


def test_a_claim_compares_the_seeds_that_both_rows_have() -> None:
    """One of the two may not have been audited yet under a seed."""
    program = """
import sys; sys.path.insert(0, 'tools')
from paper.tables import Figure, _better
rows = {'dual': {0: 9.0, 1: 3.0}, 'reference alone': {1: 4.0, 2: 1.0}, 'plain': {2: 1.0}}
table = {row: {'perplexity': Figure(values)} for row, values in rows.items()}
for other in ('reference alone', 'plain', 'no such row'):
    print(*_better(table, 'dual', other), sep='')
"""
    shown = subprocess.run([sys.executable, "-c", program], env=environment(), cwd=ROOT, capture_output=True, text=True,
                           timeout=120, check=True).stdout  # fmt: skip
    assert shown.split("\n") == [
        "| perplexity of dual below that of reference alone (ratio 0.750) | 1 of 1 seeds |",
        "",
        "",
        "",
    ]


def test_stronger_attackers_are_held_to_the_claims_and_left_out_of_the_plot(tmp_path: Path) -> None:
    program = """
import sys; sys.path.insert(0, 'tools')
from pathlib import Path
from paper.tables import Figure, _ordering, _trade_off
def row(strongest):
    return {'perplexity': Figure({0: 9.0}), 'strongest': Figure({0: strongest}), 'collections': Figure({0: 0.5}),
            'ref': Figure({0: 0.5})}
table = {'dual': row(0.55), 'dual, by 8 dual shadows': row(0.61), 'dual, cross-fitted, reference known': row(0.7),
         'dual_plus, reference known': row(0.6), 'selective': row(0.9)}
print(*_ordering(table), sep='\\n')
_trade_off(table, Path(sys.argv[1]))
"""
    plot = tmp_path / "plot.svg"
    shown = subprocess.run([sys.executable, "-c", program, str(plot)], env=environment(MPLCONFIGDIR=str(tmp_path)),
                           cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout  # fmt: skip
    held = {line.split(" | ")[0]: line.split(" | ")[1] for line in shown.splitlines() if "strongest attack on" in line}
    assert held == {
        "| strongest attack on dual, two-sided, at most .58": "1 of 1 seeds |",
        "| strongest attack on dual, by 8 dual shadows, two-sided, at most .58": "0 of 1 seeds |",
        "| strongest attack on dual_plus, reference known, two-sided, at most .58": "0 of 1 seeds |",
    }
    drawn = plot.read_text()
    assert "<!-- selective -->" in drawn
    assert "<!-- dual -->" in drawn
    assert "shadows" not in drawn
    assert "known" not in drawn
