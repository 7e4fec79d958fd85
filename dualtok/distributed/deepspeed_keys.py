"""The keys and values that a DeepSpeed JSON may have: DeepSpeed ignores an unknown key, and takes "auto" for anything.

``"auto"`` is transformers' word for "the Trainer fills this in". There is no Trainer here: what the run does not decide
keeps DeepSpeed's default, and where no default would be understood it is refused.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from dualtok.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    Json = dict[str, Any]

AUTO = "auto"
WHOLE, FLAG, TEXT, ANY = "a whole number", "true or false", "a text", ""
NUMBER = "a number"
TYPES: dict[str, tuple[type, ...]] = {WHOLE: (int,), FLAG: (bool,), TEXT: (str,), NUMBER: (int, float)}
KNOWN: dict[str, Any] = {
    "train_batch_size": WHOLE,
    "train_micro_batch_size_per_gpu": WHOLE,
    "gradient_accumulation_steps": WHOLE,
    "managed_gradient_accumulation": FLAG,
    "gradient_clipping": NUMBER,
    "steps_per_print": ANY,
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "log_level": TEXT,
    "prescale_gradients": FLAG,
    "gradient_predivide_factor": NUMBER,
    "gradient_allreduce_op": TEXT,
    "communication_data_type": TEXT,
    "seq_parallel_communication_data_type": TEXT,
    "disable_allgather": FLAG,
    "disable_python_gc": FLAG,
    "vocabulary_size": WHOLE,
    "zero_allow_untested_optimizer": FLAG,
    "zero_force_ds_cpu_optimizer": FLAG,
    "dataloader_drop_last": FLAG,
    "sparse_gradients": FLAG,
    "use_data_before_expert_parallelism": FLAG,
    "optimizer": {"type": TEXT, "legacy_fusion": FLAG, "params": ANY},
    "scheduler": {"type": TEXT, "params": ANY},
    "activation_checkpointing": {
        "partition_activations": FLAG,
        "cpu_checkpointing": FLAG,
        "contiguous_memory_optimization": FLAG,
        "number_checkpoints": ANY,
        "synchronize_checkpoint_boundary": FLAG,
        "profile": FLAG,
    },
    "flops_profiler": {
        "enabled": FLAG,
        "recompute_fwd_factor": NUMBER,
        "profile_step": WHOLE,
        "module_depth": WHOLE,
        "top_modules": WHOLE,
        "detailed": FLAG,
        "output_file": ANY,
    },
    "aio": {
        "block_size": WHOLE,
        "queue_depth": WHOLE,
        "intra_op_parallelism": WHOLE,
        "thread_count": WHOLE,
        "single_submit": FLAG,
        "overlap_events": FLAG,
        "use_gds": FLAG,
    },
    "checkpoint": {
        "tag_validation": TEXT,
        "load_universal": FLAG,
        "use_node_local_storage": FLAG,
        "parallel_write": ANY,
        "writer": ANY,
    },
    "data_types": {"grad_accum_dtype": TEXT, "param_dtype": TEXT, "buffer_dtype": TEXT, "keep_in_fp32_modules": ANY},
    "timers": {"throughput": {"enabled": FLAG, "synchronized": FLAG}},
    "pipeline": {
        "stages": ANY,
        "partition": TEXT,
        "seed_layers": FLAG,
        "activation_checkpoint_interval": WHOLE,
        "pipe_partitioned": FLAG,
        "grad_partitioned": FLAG,
    },
    **dict.fromkeys(
        (
            "tensorboard",
            "wandb",
            "csv_monitor",
            "comet",
            "amp",
            "torch_autocast",
            "elasticity",
            "compile",
            "autotuning",
            "curriculum_learning",
            "data_efficiency",
            "progressive_layer_drop",
            "compression_training",
            "eigenvalue",
            "quantize_training",
            "weight_quantization",
            "hybrid_engine",
            "tensor_parallel",
            "expert_parallel",
            "sparse_attention",
            "sequence_parallel_size",
            "nebula",
            "datastates_ckpt",
        ),
        ANY,
    ),
}
"""Keys that DeepSpeed 0.19 reads outside its own pydantic sections, and what they hold."""
SECTIONS = {
    "zero_optimization": ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
    "bf16": ("deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
    "bfloat16": ("deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
    "fp16": ("deepspeed.runtime.precision_config", "DeepSpeedFP16Config"),
    "comms_logger": ("deepspeed.comm.config", "CommsLoggerConfig"),
}
"""Sections that DeepSpeed describes itself."""
SIZE, SIZE_OR_0, STAGE, DEVICE = "at least 1", "at least 0", "0 to 3", "none, cpu or nvme"
OFFLOAD = {"device": DEVICE, "nvme_path": TEXT, "buffer_count": SIZE_OR_0, "pin_memory": FLAG}
SWITCH = {"enabled": FLAG}
ORDINARY: dict[str, dict[str, Any]] = {
    "zero_optimization": {
        "stage": STAGE,
        "contiguous_gradients": FLAG,
        "reduce_scatter": FLAG,
        "allgather_partitions": FLAG,
        "overlap_comm": FLAG,
        "round_robin_gradients": FLAG,
        "reduce_bucket_size": SIZE,
        "allgather_bucket_size": SIZE_OR_0,
        "sub_group_size": SIZE_OR_0,
        "stage3_prefetch_bucket_size": SIZE_OR_0,
        "stage3_param_persistence_threshold": SIZE_OR_0,
        "stage3_max_live_parameters": SIZE_OR_0,
        "stage3_max_reuse_distance": SIZE_OR_0,
        "stage3_gather_16bit_weights_on_model_save": FLAG,
        "offload_param": {**OFFLOAD, "buffer_size": SIZE_OR_0, "max_in_cpu": SIZE_OR_0},
        "offload_optimizer": {**OFFLOAD, "pipeline_read": FLAG, "pipeline_write": FLAG, "fast_init": FLAG},
    },
    "bf16": SWITCH,
    "bfloat16": SWITCH,
    "fp16": SWITCH,
}
"""What is in most of these sections, and surely right: DeepSpeed, which takes 2 s to import, is not asked about it."""


def checked(config: Json, file: str | Path) -> Json:
    """Return a DeepSpeed configuration as DeepSpeed would take it, without what stands for a default.

    Args:
        config: the content of the JSON.
        file: names it in errors.

    Raises:
        ConfigError: a key is unknown, or a value is not of its kind; names the key and the nearest known one.
    """
    zero = config.get("zero_optimization")
    if isinstance(zero, bool):  # an older form
        config = config | {"zero_optimization": {"stage": int(zero)}}
    if isinstance(zero, dict) and zero.get("stage") == AUTO:
        raise ConfigError(
            f'{file}: zero_optimization.stage is "auto", which nothing decides here (DeepSpeed would take 0); write 0, '
            "1, 2 or 3"
        )
    kept: Json = {}
    for key, value in config.items():
        if key in SECTIONS:
            kept[key] = _section(value, key, file)
        else:
            _require_known(key, [*KNOWN, *SECTIONS], "", file)
            if (known := _plain(value, KNOWN[key], key, file)) is not None:
                kept[key] = known
    return kept


def _plain(value: Any, kind: Any, key: str, file: str | Path) -> Any:
    """Return a value without what is "auto" in it, or None where it is all there was."""
    if value == AUTO and key not in RUN_DECIDES:
        return None
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            raise ConfigError(f"{file}: {key} is {value!r}, but must be an object {{...}}")
        for name in value:
            _require_known(name, kind, f"{key}.", file)
        inner = {name: _plain(one, kind[name], f"{key}.{name}", file) for name, one in value.items()}
        return {name: one for name, one in inner.items() if one is not None}
    if kind in TYPES and value != AUTO:
        right = isinstance(value, TYPES[kind]) and (kind == FLAG or not isinstance(value, bool))
        if not right and value is not None:
            raise ConfigError(f"{file}: {key} is {value!r}, but must be {kind}")
    return value


RUN_DECIDES = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "data_types.grad_accum_dtype",
)
"""Where "auto" is filled in from the run."""


def _section(value: Any, key: str, file: str | Path) -> Json:
    """Return a section that DeepSpeed describes by a pydantic model, after that model took it."""
    if isinstance(value, dict) and _is_ordinary(value, ORDINARY.get(key, {})):
        return value
    module, name = SECTIONS[key]
    model = getattr(import_module(module), name)
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: {key} is {value!r}, but must be an object {{...}}")
    given = _known_fields(value, model, key, file)
    try:
        model(**{name: one for name, one in given.items() if one != AUTO})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([key, *map(str, first["loc"])])
        raise ConfigError(f"{file}: {where} is {first['input']!r}: {first['msg']}") from None
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"{file}: {key}: {' '.join(str(error).split())[:200]}") from None
    return given


def _is_ordinary(value: Any, kind: Any) -> bool:
    """Return whether a value is one that DeepSpeed takes, as far as :data:`ORDINARY` tells; never for "auto"."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(name in kind and _is_ordinary(value[name], kind[name]) for name in value)
    if kind == DEVICE:
        return value in ("none", "cpu", "nvme")
    if kind == STAGE:
        return type(value) is int and 0 <= value <= 3
    if kind in (SIZE, SIZE_OR_0):
        whole = type(value) in (int, float) and 0 <= value < 2**53 and value == int(value)  # 5e8 is a float in JSON
        return whole and (kind == SIZE_OR_0 or value > 0)
    return type(value) in TYPES[kind] and value != AUTO


def _known_fields(value: Json, model: type[BaseModel], path: str, file: str | Path) -> Json:
    fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    fields |= {name: field.annotation for name, field in model.model_fields.items()}
    kept: Json = {}
    for key, one in value.items():
        _require_known(key, fields, f"{path}.", file)
        if one == AUTO and f"{path}.{key}" not in ("bf16.enabled", "bfloat16.enabled"):
            continue
        inner = _model_in(fields[key])
        kept[key] = _known_fields(one, inner, f"{path}.{key}", file) if inner and isinstance(one, dict) else one
    return kept


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the pydantic model of a field that holds one, or None."""
    choices = [annotation, *get_args(annotation)]
    return next((one for one in choices if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _require_known(key: str, known: Iterable[str], path: str, file: str | Path) -> None:
    names = list(known)
    if key not in names:
        raise ConfigError(
            f"{file}: {path}{key} is no key of DeepSpeed{did_you_mean(key, names)}, which would ignore it; correct it "
            "or take it out"
        )
