"""Every way to start a training run, and what a run leaves for its monitoring."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import warm
from tests.support import ROOT, deepspeed_json, dualtok, environment, save_model, succeed, tiny_llama_config, write_run

STEPS = 6


def run_file(small_corpus: dict[str, Any], path: Path, **sections: Any) -> Path:
    train = {
        "learning_rate": 1e-2,
        "batch_size": 8,
        "steps": STEPS,
        "precision": "fp32",
        "evaluate_every": 3,
        "evaluation_blocks": 16,
        "deepspeed": deepspeed_json("zero3"),
        **sections.pop("train", {}),
    }
    return write_run(
        path,
        {"dir": small_corpus["dir"]},
        output_dir=str(path.with_suffix("")),
        model={"config": tiny_llama_config()},
        train=train,
        **{"objective": "causal_lm", **sections},
    )


def losses(run: Path) -> list[float]:
    lines = (run.with_suffix("") / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_every_launcher_trains_the_same_model(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    runs = {name: run_file(small_corpus, tmp_path / f"{name}.yaml") for name in ("plain", "torchrun", "deepspeed")}
    before = shared_buffers()
    succeed(dualtok("train", runs["plain"]))
    for name in ("torchrun", "deepspeed"):
        command = [str(ROOT / "launch" / f"{name}.sh"), "train", str(runs[name])]
        logs = tmp_path / "logs" / name
        path = f"{warm.programs()}:{os.environ['PATH']}"
        variables = environment(RANKS="2", INTERFACE="lo", LOGS=str(logs), PATH=path)
        succeed(
            subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
        )
        texts = [path.read_text() for path in logs.rglob("*.log") if re.search(r"/\d/stdout|_rank\d", str(path))]
        assert len(texts) == 2, f"one log per rank: {list(logs.rglob('*'))}"
        assert sum(f"{STEPS} steps done" in text for text in texts) == 1
    expected = losses(runs["plain"])
    assert len(expected) == STEPS
    for name in ("torchrun", "deepspeed"):
        assert losses(runs[name]) == pytest.approx(expected, rel=1e-5)
    deadline = time.monotonic() + 60
    while shared_buffers() - before:  # another test's job may be between making its buffer and taking away the name
        assert time.monotonic() < deadline, "shared memory was left behind"
        time.sleep(0.5)


def shared_buffers() -> set[Path]:
    """Return the buffers of DeepSpeed's CPU all-reduce that have a name."""
    return set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))


@pytest.mark.slow
def test_a_dual_run_can_be_watched(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    """The event file of a real two-rank run, read back with TensorBoard's reader; and what the terminal showed."""
    reference = save_model(tmp_path / "reference", seed=9)
    run = run_file(
        small_corpus,
        tmp_path / "run.yaml",
        objective="dual",
        reference={"model": str(reference)},
        monitor={"log_every": 1, "histogram_every": 2},
        train={"gradient_accumulation": 2},
    )
    succeed(dualtok("score", run))
    result = dualtok("train", run, ranks=2)
    succeed(result)

    events = EventAccumulator(str(run.with_suffix("") / "events"), size_guidance={"histograms": 0})
    events.Reload()
    history = [json.loads(line) for line in (run.with_suffix("") / "metrics.jsonl").read_text().splitlines()]
    columns = {
        "loss/dual": "loss",
        "loss/hard": "hard_loss",
        "loss/plain": "plain_loss",
        "optimizer/learning_rate": "learning_rate",
        "optimizer/gradient_norm": "gradient_norm",
        "data/skipped_blocks": "skipped_blocks",
        "throughput/tokens_per_second": "tokens_per_second",
        "memory/peak_gib": "peak_memory_gib",
    }
    for tag, column in columns.items():
        found = events.Scalars(tag)
        assert [event.step for event in found] == list(range(1, STEPS + 1)), tag
        assert [event.value for event in found] == pytest.approx([row[column] for row in history], rel=1e-6), tag
    memorized = {event.step: event.value for event in events.Scalars("loss/memorized")}
    assert memorized, "no token was unlearned, so the test would say little"
    for step, value in memorized.items():
        assert value == pytest.approx(history[step - 1]["memorized_loss"], rel=1e-6)
    shares = [[event.value for event in events.Scalars(f"share/{name}")] for name in ("hard", "memorized", "neutral")]
    assert [sum(parts) for parts in zip(*shares, strict=True)] == pytest.approx([1.0] * STEPS, abs=1e-6)
    assert shares[0] == pytest.approx([0.6] * STEPS, abs=2e-3)
    assert all(0.0 <= share <= 0.2 for share in shares[1])

    histograms = events.Histograms("calibrated/s")
    assert [event.step for event in histograms] == [2, 4, 6]
    assert [event.histogram_value.num for event in histograms] == [history[step - 1]["tokens"] for step in (2, 4, 6)]
    for tag in ("validation_loss", "validation_perplexity", "member_loss", "member_gap", "ref_auc"):
        assert [event.step for event in events.Scalars(f"evaluation/{tag}")] == [3, 6], tag
    assert all(0.0 <= event.value <= 1.0 for event in events.Scalars("evaluation/ref_auc"))

    shown = [line for line in result.stderr.splitlines() if line.startswith("train dual ")]
    assert [line.split()[2] for line in shown] == [f"{step}/{STEPS}" for step in range(1, STEPS + 1)], "one rank only"
    assert all("loss" in line and "tokens/s" in line and "left" in line for line in shown)


@pytest.mark.slow
def test_bf16_with_activation_checkpointing_learns(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    model = {"config": tiny_llama_config(), "activation_checkpointing": True}
    train = {"steps": 30, "precision": "bf16", "schedule": "linear", "warmup_steps": 5, "gradient_accumulation": 2}
    run = run_file(small_corpus, tmp_path / "run.yaml", train=train)
    values = json.dumps(model)
    succeed(dualtok("train", run, f"model={values}", ranks=2))
    seen = losses(run)
    assert len(seen) == 30
    assert sum(seen[-5:]) / 5 < sum(seen[:5]) / 5 - 0.3
    rates = [json.loads(line)["learning_rate"] for line in (run.with_suffix("") / "metrics.jsonl").open()]
    assert rates[:6] == pytest.approx([0.0, 0.002, 0.004, 0.006, 0.008, 0.01])
    assert rates[-1] == pytest.approx(0.01 / 25)


@pytest.mark.slow
def test_the_checkpoint_that_validates_best_is_kept_beside_the_last(
    small_corpus: dict[str, Any], tmp_path: Path
) -> None:
    """A learning rate at which the small model soon overfits; the best checkpoint is then not the last."""
    run = run_file(
        small_corpus,
        tmp_path / "run.yaml",
        train={
            "split": "auxiliary",
            "learning_rate": 3e-2,
            "steps": 160,
            "evaluate_every": 20,
            "schedule": "constant",
            "deepspeed": deepspeed_json("zero1"),
        },
    )
    succeed(dualtok("train", run))
    folder = run.with_suffix("")
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    best = min(evaluations, key=lambda row: row["validation_loss"])
    assert best["step"] < 160, "the run did not overfit, so the test would say little"
    checkpoints = folder / "checkpoints"
    assert (checkpoints / "best").read_text() == f"step-{best['step']:08d}"
    assert (checkpoints / "latest").read_text() == "step-00000160"
    kept = {path.name for path in checkpoints.glob("step-*")}
    assert kept == {(checkpoints / name).read_text() for name in ("best", "latest")}
    assert all((checkpoints / name / "COMPLETE").is_file() for name in kept)
