"""DP-SGD as its users run it: the same on one rank and on two, interrupted or not; its account; what it refuses."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from dualtok.config.load import parse_run
from dualtok.errors import ConfigError
from tests.multi_rank.test_resume import kill_after_step
from tests.support import (
    dualtok,
    error_line,
    history,
    read_weights,
    relative_distance,
    save_model,
    succeed,
    tiny_llama_config,
    write_run,
)

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 20


def private_run(path: Path, small_corpus: dict[str, Any], **changes: Any) -> Path:
    model = changes.pop("model", {"config": tiny_llama_config()})
    train = {
        "engine": "opacus",
        "learning_rate": 5e-3,
        "batch_size": 8,
        "gradient_accumulation": 2,
        "steps": STEPS,
        "precision": "fp32",
        "warmup_steps": 2,
        "evaluate_every": 10,
        "checkpoint_every": 5,
        **changes.pop("train", {}),
    }
    privacy = {"epsilon": 8.0, "delta": 1e-5, **changes.pop("privacy", {})}
    return write_run(
        path,
        small_corpus,
        seed=5,
        objective="causal_lm",
        model=model,
        privacy=privacy,
        train=train,
        monitor={"log_every": 1},
        **changes,
    )


@pytest.mark.slow
def test_an_interrupted_run_goes_on_on_two_ranks_as_if_nothing_had_happened(
    small_corpus: dict[str, Any], tmp_path: Path
) -> None:
    whole = private_run(tmp_path / "whole.yaml", small_corpus)
    succeed(dualtok("train", whole))
    broken = private_run(tmp_path / "broken.yaml", small_corpus)
    kill_after_step(broken, 5, ranks=1)
    assert len(history(broken)) < STEPS, "the run was not interrupted"
    succeed(dualtok("train", broken, "--resume", ranks=2))
    for step, other in zip(history(broken), history(whole), strict=True):
        # Not the objective's loss: it is a mean over parts, and ranks cut a draw elsewhere.
        assert step["plain_loss"] == pytest.approx(other["plain_loss"], rel=1e-4)
        assert step["tokens"] == other["tokens"]
        assert step["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
    weights = []
    for run in (whole, broken):
        succeed(dualtok("export", run.with_suffix(""), run.with_suffix(".hf"), "--checkpoint", "latest"))
        weights.append(read_weights(run.with_suffix(".hf")))
    assert relative_distance(*weights) < 1e-4
    assert "lm_head.weight" in weights[0], "the untied head is lost"
    accounts = [json.loads((run.with_suffix("") / "privacy.json").read_text()) for run in (whole, broken)]
    assert accounts[0] == accounts[1]
    assert 7.9 < accounts[0]["epsilon"] <= 8.0
    assert accounts[0]["steps_done"] == STEPS


@pytest.mark.slow
def test_adapters_are_trained_privately(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", seed=7, initializer_range=0.1)
    run = private_run(
        tmp_path / "lora.yaml",
        small_corpus,
        train={"steps": 4},
        model={"path": str(base), "lora": {"rank": 4, "alpha": 8}},
    )
    succeed(dualtok("train", run))
    succeed(dualtok("export", run.with_suffix(""), tmp_path / "adapter"))
    adapter = read_weights(tmp_path / "adapter")
    assert all("lora" in name for name in adapter)
    assert any(float(tensor.abs().max()) > 0 for name, tensor in adapter.items() if "lora_B" in name)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no target": ({"privacy": {"epsilon": None}}, "exactly one of"),
    "ZeRO": ({"train": {"deepspeed": "ds_configs/zero3.json"}}, "train.deepspeed: has no effect with"),
    "a pipeline": ({"train": {"pipeline": {"stages": 2}}}, "train.pipeline: has no effect with"),
    "bf16": ({"train": {"precision": "bf16"}}, "set precision: fp32"),
    "another objective": ({"objective": "goldfish"}, "objective: train.engine=opacus"),
    "no privacy": ({"privacy": None}, "privacy: missing"),
    "privacy without the engine": ({"train": {"engine": "zero"}}, "privacy: has an effect with"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_private_is_refused(small_corpus: dict[str, Any], tmp_path: Path, case: str) -> None:
    changes, told = REFUSED[case]
    run = yaml.safe_load(private_run(tmp_path / "run.yaml", small_corpus).read_text())
    for section, change in changes.items():
        run[section] = {**run[section], **change} if isinstance(change, dict) else change
    with pytest.raises(ConfigError, match=re.escape(told)):
        parse_run(run, source="run.yaml")


def test_a_batch_larger_than_the_split_is_refused(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    run = private_run(tmp_path / "run.yaml", small_corpus, train={"batch_size": 4096})
    assert "fewer than train.batch_size=4096" in error_line(dualtok("train", run))
