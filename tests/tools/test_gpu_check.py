"""The check of a machine with a GPU, as far as it can be made without: small, by the same ways."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, environment


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/gpu_check.py", *arguments], env=environment(CUDA_VISIBLE_DEVICES=""), cwd=ROOT,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def rows(table: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return dict(line for line in lines if len(line) == 2)


@pytest.mark.slow
def test_its_table_holds_what_was_measured(tmp_path: Path) -> None:
    output = tmp_path / "table.md"
    wanted = ["machine", "head:liger", "step:plain", "step:dual"]
    done = check("--folder", str(tmp_path / "work"), "--output", str(output), "--only", *wanted)
    assert done.returncode == 0, done.stderr
    assert output.read_text() == done.stdout
    table, results = rows(done.stdout), json.loads((tmp_path / "work" / "results.json").read_text())
    steps = {name: results[f"step:{name}"] for name in ("plain", "dual")}
    assert all(figures["seconds"] > 0 and figures["tokens"] == 512 for figures in steps.values())
    assert 0.5 < sum(steps["dual"]["phases"].values()) / steps["dual"]["seconds"] < 2, "the run's own timer"
    ratio = steps["dual"]["seconds"] / steps["plain"]["seconds"]
    assert table["dual step with stored scores / dualtok's plain step"] == f"{ratio:.3f}"
    speed = steps["dual"]["tokens"] / steps["dual"]["seconds"]
    assert f"{speed:,.0f} tokens/s" in table["step: dual"]
    assert "cores" in table["device"]
    why = table["head:liger"]
    assert "needs a GPU" in why or "is not installed" in why, "a failed row says why; this one does not fail the check"


@pytest.mark.slow
def test_every_way_of_training_gives_the_same_losses(tmp_path: Path) -> None:
    ways = ["bf16", "pipeline"]
    done = check("--folder", str(tmp_path), "--only", "parity", "command:dp_sgd", "--ways", *ways)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    unlike = results["parity"]["unlike"]
    assert set(unlike) == {"host cores", *ways}
    assert 0 < unlike["bf16"]["plain_loss"] < 0.05, "another precision is seen as such"
    assert unlike["pipeline"]["plain_loss"] < 1e-5
    assert unlike["pipeline"]["memorised_tokens"] == 0
    assert results["parity"]["tokens"] > 0
    table = rows(done.stdout)
    assert table["parity: pipeline, 2 ranks"].endswith(", 0")
    assert table["command: dp_sgd"].startswith("loss 8.")


def test_what_it_does_not_measure_is_named(tmp_path: Path) -> None:
    done = check("--folder", str(tmp_path), "--only", "step:dula")
    assert done.returncode == 2
    assert "--only: no measurement 'step:dula'; there are machine, parity, command, head, step, " in done.stderr
    done = check("--folder", str(tmp_path), "--only", "parity", "--ways", "fp4")
    assert done.returncode == 2
    assert "--ways: no way 'fp4'; there are host cores, device, bf16, " in done.stderr
