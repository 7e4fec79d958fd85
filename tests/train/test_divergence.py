"""A run that diverges stops with words, and leaves its last good checkpoint in force."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import ROOT, deepspeed_json, dualtok, environment, error_line, python, tiny_llama_config, write_run

if TYPE_CHECKING:
    from pathlib import Path

# From the fourth step on every gradient is NaN while the loss stays finite, as after an overflow in the backward pass.
SPOILED = """
import sys
from dualtok.train.engines import objective_model as zero
compute, calls = zero.ObjectiveModel.compute, 0
def spoiled(self, batch):
    global calls
    loss = compute(self, batch)
    if self.training:
        calls += 1
        if calls > 3:
            loss.register_hook(lambda gradient: gradient * float("nan"))
    return loss
zero.ObjectiveModel.compute = spoiled
from dualtok.cli import main
sys.argv = ["dualtok", "train", sys.argv[1]]
main()
"""


def run_file(small_corpus: dict[str, Any], path: Path, **train: Any) -> Path:
    return write_run(
        path,
        {"dir": small_corpus["dir"]},
        objective="causal_lm",
        model={"config": tiny_llama_config()},
        train={"learning_rate": 1e-3, "batch_size": 4, "steps": 8, "precision": "fp32", "checkpoint_every": 1, **train},
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_that_are_not_finite_stop_the_run(small_corpus: dict[str, Any], tmp_path: Path, stage: int) -> None:
    run = run_file(small_corpus, tmp_path / "run.yaml", deepspeed=deepspeed_json(f"zero{stage}"))
    done = subprocess.run(
        python("-c", SPOILED, run),
        env=environment(),
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert "step 4: training diverged" in error_line(done)
    steps = [json.loads(row)["step"] for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000003"


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    run = run_file(small_corpus, tmp_path / "run.yaml", learning_rate=1e30, checkpoint_every=100)
    assert "training diverged" in error_line(dualtok("train", run))
    assert not list((tmp_path / "run").rglob("COMPLETE")), "weights that are not finite were saved"
