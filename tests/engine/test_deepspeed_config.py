"""The DeepSpeed JSON and the run's YAML must agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dualtok.engine.config import TrainConfig
from dualtok.engine.deepspeed_config import (
    inference_config,
    offloads_optimizer,
    refuse_wrong_gradients,
    training_config,
)
from dualtok.errors import ConfigError
from tests.support import deepspeed_json


def settings(path: Path | str | None, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "learning_rate": 1e-3,
        "batch_size": 16,
        "steps": 1,
        "gradient_accumulation": 2,
        **changes,
    }
    return TrainConfig(deepspeed=None if path is None else str(path), **values)


def written(folder: Path, values: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_the_batch_is_shared_by_the_ranks() -> None:
    config = training_config(settings(None), world_size=4)
    assert config["train_batch_size"] == 16
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize("version", ["0.18.0", "0.18.9", "0.19.5"])
def test_a_deepspeed_with_wrong_gradients_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    metadata = tmp_path / f"deepspeed-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"deepspeed {version} is installed.*install deepspeed>=0.19.8"):
        training_config(settings(None), world_size=4)


@pytest.mark.parametrize("version", ["0.17.6", "0.19.6", "0.19.8"])
def test_other_deepspeeds_are_not_refused_for_their_gradients(version: str) -> None:
    refuse_wrong_gradients(version)


def test_ranks_that_cannot_share_the_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 ranks cannot share"):
        training_config(settings(None), world_size=3)


def test_agreeing_and_automatic_values_pass(tmp_path: Path) -> None:
    path = written(tmp_path, {
        "gradient_clipping": 1, "train_batch_size": "auto", "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
        "zero_optimization": {"stage": 1},
    })  # fmt: skip
    config = training_config(settings(path), world_size=1)
    assert config["train_batch_size"] == 16
    assert "optimizer" not in config, "dualtok builds the optimiser itself"


@pytest.mark.parametrize(
    ("values", "both_places"),
    [
        ({"gradient_clipping": 0.5}, ["gradient_clipping is 0.5", "train.gradient_clipping"]),
        ({"train_batch_size": 32}, ["train_batch_size is 32", "train.batch_size"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled is False", "train.precision"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["data_types.grad_accum_dtype", "fp32"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 5}}}, ["optimizer.params.lr is 5", "train.learning_rate"]),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type", "AdamW"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["'scheduler'", "train.schedule"]),
        ({"fp16": {"enabled": True}}, ["'fp16'", "train.precision"]),
    ],
)
def test_a_contradiction_names_both_places(tmp_path: Path, values: dict[str, Any], both_places: list[str]) -> None:
    path = written(tmp_path, values)
    with pytest.raises(ConfigError) as caught:
        training_config(settings(path), world_size=1)
    for place in [str(path), *both_places]:
        assert place in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"), [("{", "line 1: not valid JSON"), ("[]", "JSON object"), (None, "no such DeepSpeed")]
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: str | None, expected: str) -> None:
    path = tmp_path / "absent.json" if content is None else written(tmp_path, content)
    with pytest.raises(ConfigError, match=expected):
        training_config(settings(path), world_size=1)


def test_a_forward_only_engine_needs_stage_3_and_drops_the_optimiser(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs stage 3"):
        inference_config(deepspeed_json("zero2"), "bf16", 4)
    config = inference_config(deepspeed_json("zero3_offload"), "bf16", 4)
    assert "offload_optimizer" not in config["zero_optimization"]
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"


def test_the_repositorys_configurations_are_what_their_names_say() -> None:
    for stage in range(4):
        config = training_config(settings(deepspeed_json(f"zero{stage}"), precision="fp32"), world_size=2)
        assert config["zero_optimization"]["stage"] == stage
    assert offloads_optimizer(training_config(settings(deepspeed_json("zero3_offload")), world_size=2))


def test_bf16_needs_a_stage_that_accumulates_in_fp32() -> None:
    assert training_config(settings(None, precision="bf16"), 1)["zero_optimization"] == {"stage": 1}
    assert training_config(settings(None, precision="fp32"), 1)["zero_optimization"] == {"stage": 0}
    with pytest.raises(ConfigError, match=r"stage is 0.*fp32"):
        training_config(settings(deepspeed_json("zero0"), precision="bf16"), 1)


def test_a_sharded_pipeline_has_one_sub_group_and_fetches_nothing_ahead(tmp_path: Path) -> None:
    layout = {"engine": "sharded_pipeline", "pipeline": {"stages": 2}}
    zero = training_config(settings(None, **layout), world_size=1)["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["stage3_prefetch_bucket_size"] == 0
    assert zero["sub_group_size"] >= 10**15, "stages with different numbers of sub-groups wait for each other for ever"
    for key in ("sub_group_size", "stage3_prefetch_bucket_size"):
        path = written(tmp_path, {"zero_optimization": {"stage": 3, key: 1000}})
        with pytest.raises(ConfigError, match=key):
            training_config(settings(path, **layout), world_size=1)
