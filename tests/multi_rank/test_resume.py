"""A run that is interrupted and resumed is the run that was never interrupted."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.faults.worker import FAULT, SAMPLES, Fault
from tests.support import (
    ROOT,
    command,
    deepspeed_json,
    dualtok,
    environment,
    error_line,
    history,
    measured,
    read_weights,
    save_model,
    succeed,
    tiny_llama_config,
    write_run,
)

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 12


def run_file(
    small_corpus: dict[str, Any], path: Path, reference: Path, stage: int, engine: dict[str, Any] | None = None
) -> Path:
    return write_run(
        path,
        small_corpus,
        seed=5,
        objective="dual",
        # GPT-2 has dropout, whose random numbers must continue too.
        model={"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}},
        reference={"model": str(reference)},
        monitor={"log_every": 1, "histogram_every": 4},
        train={
            "learning_rate": 5e-3,
            "batch_size": 8,
            "gradient_accumulation": 2,
            "steps": STEPS,
            "precision": "fp32",
            "warmup_steps": 2,
            "evaluate_every": 6,
            "checkpoint_every": 4,
            "deepspeed": deepspeed_json(f"zero{stage}"),
            **(engine or {}),
        },
    )


def kill_after_step(run: Path, step: int, ranks: int) -> None:
    """Train until one rank is killed two steps after the checkpoint of ``step``, which ends the job."""
    samples, mark = run.with_suffix(".samples"), run.with_suffix(".killed")
    samples.mkdir()
    fault = Fault("kill", rank=ranks - 1, step=step + 2, mark=str(mark))
    job = command("tests.faults.worker", "train", run, ranks=ranks)
    variables = {FAULT: fault.as_json(), SAMPLES: str(samples), "LOCAL_SIZE": str(ranks)}
    ended = subprocess.run(
        job, env=environment(**variables), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert mark.exists(), f"the run ended before it could be interrupted\n{ended.stderr[-3000:]}"
    assert ended.returncode != 0
    assert (run.with_suffix("") / "checkpoints" / "latest").read_text() == f"step-{step:08d}"


@pytest.mark.slow
def test_an_interrupted_run_continues_exactly(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    """The engine with the most parts; ``tests/faults`` interrupts ZeRO-3, ``test_elastic_resume`` the others."""
    stage, ranks, engine = 3, 4, {"engine": "sharded_pipeline", "pipeline": {"stages": 2}}
    reference = save_model(tmp_path / "reference", seed=7)
    whole = run_file(small_corpus, tmp_path / "whole.yaml", reference, stage, engine)
    broken = run_file(small_corpus, tmp_path / "broken.yaml", reference, stage, engine)
    succeed(dualtok("score", whole))
    succeed(dualtok("train", whole, ranks=ranks))
    kill_after_step(broken, 4, ranks)
    assert len(history(broken)) < STEPS, "the run was not interrupted"
    succeed(dualtok("train", broken, "--resume", ranks=ranks))

    assert measured(broken) == measured(whole)
    assert history(whole)[-1]["step"] == STEPS
    evaluations = [run.with_suffix("") / "evaluations.jsonl" for run in (whole, broken)]
    assert evaluations[0].read_text() == evaluations[1].read_text()
    for run in (whole, broken):
        succeed(dualtok("export", run.with_suffix(""), run.with_suffix(".hf"), "--checkpoint", "latest"))
    weights = [read_weights(run.with_suffix(".hf")) for run in (whole, broken)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.slow
def test_a_run_is_not_mixed_with_an_earlier_one(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run.yaml",
        small_corpus,
        objective="causal_lm",
        model={"config": tiny_llama_config()},
        train={"learning_rate": 1e-3, "batch_size": 4, "steps": 2, "precision": "fp32"},
    )
    assert "no checkpoint" in dualtok("train", run, "--resume").stderr
    succeed(dualtok("train", run))
    again = dualtok("train", run)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    line = error_line(dualtok("train", run, "--resume", "train.learning_rate=0.5"))
    assert "train.learning_rate: 0.5, but the run to resume" in line
    assert "0.001" in line
    assert "learning_rate: 0.001" in (run.with_suffix("") / "run.yaml").read_text(), "the run's settings were lost"


@pytest.mark.slow
def test_a_kill_during_the_first_save_leaves_a_run_that_can_be_started_again(
    small_corpus: dict[str, Any], tmp_path: Path
) -> None:
    run = write_run(
        tmp_path / "run.yaml",
        small_corpus,
        objective="causal_lm",
        model={"config": tiny_llama_config()},
        train={"learning_rate": 1e-3, "batch_size": 4, "steps": 2, "precision": "fp32"},
    )
    torn = tmp_path / "run" / "checkpoints" / "step-00000002"
    torn.mkdir(parents=True)
    (torn / "mp_rank_00_model_states.pt").write_bytes(b"half")
    assert "not a complete checkpoint" in error_line(dualtok("train", run, "--resume"))
    succeed(dualtok("train", run))
    assert (torn / "COMPLETE").is_file()
