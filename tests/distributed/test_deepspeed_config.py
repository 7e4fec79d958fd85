"""The DeepSpeed JSON and the run's YAML must agree."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.config.train import TrainConfig
from dualtok.distributed.deepspeed_config import (
    inference_config,
    offloads_optimizer,
    refuse_wrong_gradients,
    training_config,
)
from dualtok.errors import ConfigError
from tests.support import deepspeed_json

if TYPE_CHECKING:
    from pathlib import Path


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
    path = written(
        tmp_path,
        {
            "gradient_clipping": 1,
            "train_batch_size": "auto",
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
            "zero_optimization": {"stage": 1},
        },
    )
    config = training_config(settings(path), world_size=1)
    assert config["train_batch_size"] == 16
    assert "optimizer" not in config, "dualtok builds the optimizer itself"


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


def test_a_forward_only_engine_needs_stage_3_and_drops_the_optimizer(tmp_path: Path) -> None:
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


UNKNOWN = [
    ({"zero_optimisation": {"stage": 3}}, "zero_optimisation is no key of DeepSpeed (did you mean 'zero_optim"),
    ({"gradient_cliping": 5.0}, "gradient_cliping is no key of DeepSpeed (did you mean 'gradient_clipping'?)"),
    ({"bfloat": {"enabled": True}}, "bfloat is no key of DeepSpeed (did you mean 'bfloat16'?)"),
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "zero_optimization.overlap_com is no key of DeepSpeed"),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
        "zero_optimization.offload_param.devise is no key of DeepSpeed (did you mean 'device'?)",
    ),
    ({"bf16": {"enable": True}}, "bf16.enable is no key of DeepSpeed (did you mean 'enabled'?)"),
    ({"aio": {"blocksize": 1}}, "aio.blocksize is no key of DeepSpeed (did you mean 'block_size'?)"),
    ({"flops_profiler": {"enabled": False, "profile_steps": 1}}, "flops_profiler.profile_steps is no key"),
    ({"optimizer": {"type": "AdamW", "parms": {}}}, "optimizer.parms is no key of DeepSpeed (did you mean 'params'?)"),
    ({"optimizer": {"type": "AdamW", "params": {"weight_deca": 0.1}}}, "optimizer.params.weight_deca is no setting"),
    ({"comment": "ours"}, "comment is no key of DeepSpeed"),
]
CONTRADICTIONS = [
    ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "optimizer.params.adam_w_mode is False"),
    ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, "optimizer.params.amsgrad is True"),
    ({"optimizer": {"type": "AdamW", "params": {"bias_correction": False}}}, "optimizer.params.bias_correction is"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 2e-3}}}, "optimizer.params.lr is 0.002"),
    ({"torch_autocast": {"enabled": True}}, "'torch_autocast' is set, but the run decides it: use train.precision"),
    ({"activation_checkpointing": {"cpu_checkpointing": True}}, "use model.activation_checkpointing"),
    ({"compile": {"deepcompile": True}}, "'compile' is not supported"),
    ({"tensor_parallel": {"autotp_size": 2}}, "'tensor_parallel' is not supported"),
]
NOT_OF_ITS_KIND = [
    ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage is "auto", which nothing decides here'),
    ({"zero_optimization": {"stage": "three"}}, "zero_optimization.stage is 'three': "),
    ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage is 7: "),
    ({"zero_optimization": [3]}, "zero_optimization is [3], but must be an object"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size is -1: "),
    ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown is 'yes', but must be true or false"),
    ({"gradient_clipping": "1"}, "gradient_clipping is '1', but must be a number"),
    ({"train_batch_size": 16.5}, "train_batch_size is 16.5, but must be a whole number"),
    ({"train_batch_size": True}, "train_batch_size is True, but must be a whole number"),
    ({"optimizer": "AdamW"}, "optimizer is 'AdamW', but must be an object"),
    ({"optimizer": {"type": "AdamW", "params": [1]}}, "optimizer.params is [1], but must be an object"),
]


@pytest.mark.parametrize(("values", "message"), UNKNOWN + CONTRADICTIONS + NOT_OF_ITS_KIND)
def test_a_json_that_deepspeed_would_take_otherwise_is_refused(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        training_config(settings(written(tmp_path, values), precision="fp32"), world_size=1)
    assert message in str(caught.value)
    assert str(tmp_path / "ds.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_holds_of_a_references_json(tmp_path: Path) -> None:
    path = written(tmp_path, {"zero_optimization": {"stage": 3, "stage3_max_live_parameter": 5}})
    with pytest.raises(ConfigError, match=r"stage3_max_live_parameter is no key .*'stage3_max_live_parameters'"):
        inference_config(path, "fp32", 1)


def test_auto_is_what_deepspeed_does_by_itself(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {
            "steps_per_print": "auto",
            "wall_clock_breakdown": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
            "scheduler": "auto",
        },
    )
    config = training_config(settings(path, precision="fp32"), world_size=1)
    assert config["zero_optimization"] == {"stage": 2}
    assert "wall_clock_breakdown" not in config
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"]["enabled"] is False


@pytest.mark.parametrize(("written_as", "stage"), [(True, 1), (False, 0)])
def test_the_older_form_of_zero_is_a_stage(tmp_path: Path, written_as: bool, stage: int) -> None:
    path = written(tmp_path, {"zero_optimization": written_as})
    assert training_config(settings(path, precision="fp32"), 1)["zero_optimization"] == {"stage": stage}


def test_the_known_keys_are_those_that_deepspeed_reads(tmp_path: Path) -> None:
    """DeepSpeed's own examples of each section."""
    path = written(
        tmp_path,
        {
            "steps_per_print": 100,
            "prescale_gradients": False,
            "gradient_predivide_factor": 1.0,
            "dump_state": False,
            "communication_data_type": "fp32",
            "disable_allgather": True,
            "memory_breakdown": False,
            "dataloader_drop_last": True,
            "checkpoint": {"tag_validation": "Warn", "load_universal": False},
            "comms_logger": {"enabled": False, "verbose": False, "prof_all": True},
            "timers": {"throughput": {"enabled": True}},
            "flops_profiler": {
                "enabled": False,
                "profile_step": 1,
                "module_depth": -1,
                "top_modules": 1,
                "detailed": True,
                "output_file": None,
            },
            "aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 1.0},
                "offload_param": {"device": "cpu"},
                "stage3_gather_16bit_weights_on_model_save": False,
                "sub_group_size": 1e9,
                "stage3_max_live_parameters": 1e9,
                "round_robin_gradients": False,
                "zero_hpz_partition_size": 1,
                "ignore_unused_parameters": True,
            },
        },
    )
    assert training_config(settings(path, precision="fp32"), 1)["zero_optimization"]["stage"] == 3
