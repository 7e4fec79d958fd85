"""The DeepSpeed configuration of a run: a plain JSON file that users may bring, completed from the run's YAML.

What both define must agree; a contradiction is an error that names both places.
"""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from dualtok.distributed.deepspeed_keys import checked
from dualtok.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from dualtok.config.train import TrainConfig

Json = dict[str, Any]

TESTED_WITH_SHARDED_PIPELINE = ("0.19.8",)
"""DeepSpeed versions that tests/multi_rank/test_layout_parity.py has passed with."""

WRONG_GRADIENTS = ("0.18.0", "0.19.6")
"""DeepSpeed from the first to before the second divides gradients once too often under accumulation, for models that
return more than their loss (DeepSpeed issue 8224)."""

# Sections that say how something is done which dualtok does itself; silently ignoring them would mislead.
OWNED_SECTIONS = {
    "scheduler": "train.schedule and train.warmup_steps",
    "tensorboard": "monitor.tensorboard",
    "csv_monitor": "monitor.csv",
    "wandb": "monitor.wandb",
    "comet": "monitor.comet",
    "fp16": "train.precision (fp32 or bf16: gradient ascent on memorized tokens drives fp16's loss scale down)",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "model.activation_checkpointing",
    "pipeline": "train.pipeline",
    "elasticity": "train.batch_size; a run can be resumed on any number of ranks",
    "curriculum_learning": "data, whose blocks dualtok draws itself",
    "data_efficiency": "data, whose blocks dualtok draws itself",
}
UNSUPPORTED = (
    "autotuning",
    "compile",
    "compression_training",
    "eigenvalue",
    "expert_parallel",
    "hybrid_engine",
    "progressive_layer_drop",
    "quantize_training",
    "sequence_parallel_size",
    "sparse_attention",
    "tensor_parallel",
    "weight_quantization",
)
"""Sections that change what is trained, or how, in ways that were never tried with dualtok."""


IMPLEMENTATIONS = ("torch_adam", "fused", "foreach", "set_grad_none")
"""Parameters of an optimizer that choose an implementation; dualtok chooses its own."""


def refuse_wrong_gradients(installed: str) -> None:
    """Refuse the DeepSpeed versions in :data:`WRONG_GRADIENTS`.

    Raises:
        ConfigError: names the version and what to install.
    """
    first, fixed = map(Version, WRONG_GRADIENTS)
    if first <= Version(installed) < fixed:
        raise ConfigError(
            f"deepspeed {installed} is installed; from {first} to before {fixed} it divides gradients once too often "
            "under gradient accumulation; install deepspeed>=0.19.8,<0.20"
        )


def read_deepspeed_json(path: str | Path) -> Json:
    """Read a DeepSpeed JSON file.

    Raises:
        ConfigError: the file is missing or not JSON, or has a key or a value that DeepSpeed does not know.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such DeepSpeed configuration (train.deepspeed)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a DeepSpeed configuration is a JSON object")
    return checked(values, path)


def zero_stage(config: Json) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(config: Json) -> bool:
    """Return whether optimizer states live in host memory, which needs DeepSpeed's own CPU Adam."""
    device = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return device not in ("none", None)


def training_config(train: TrainConfig, world_size: int) -> Json:
    """Merge the run's ``train`` section into its DeepSpeed JSON.

    Args:
        train: the section; its sizes are global.
        world_size: data-parallel ranks.

    Raises:
        ConfigError: the batch cannot be shared by the ranks, or JSON and YAML contradict each other.
    """
    refuse_wrong_gradients(version("deepspeed"))
    half = train.precision == "bf16"
    # DeepSpeed 0.19.8 refuses stage 0 with bf16 weights and fp32 accumulation: "unsupported mix of model_dtype and
    # grad_accum_dtype". Hence stage 1 without a JSON, and an error below that names the setting.
    merged: Json = {"zero_optimization": {"stage": 1 if half else 0}}
    if train.deepspeed is not None:
        merged = read_deepspeed_json(train.deepspeed)
    elif train.engine == "sharded_pipeline":
        merged = {"zero_optimization": {"stage": 3}}
    if train.pipeline is not None:
        _fit_pipeline(merged, train)
    micro_batch = train.batch_size // train.gradient_accumulation
    if micro_batch % world_size:
        raise ConfigError(
            f"train.batch_size: {train.batch_size} blocks / {train.gradient_accumulation} accumulation steps = "
            f"{micro_batch} per micro-batch, which {world_size} ranks cannot share evenly; change train.batch_size, "
            "train.gradient_accumulation or the number of ranks"
        )
    decided: dict[str, tuple[Any, str]] = {
        "train_batch_size": (train.batch_size, "train.batch_size"),
        "train_micro_batch_size_per_gpu": (
            micro_batch // world_size,
            f"train.batch_size / train.gradient_accumulation / {world_size} ranks",
        ),
        "gradient_accumulation_steps": (train.gradient_accumulation, "train.gradient_accumulation"),
        "gradient_clipping": (train.gradient_clipping, "train.gradient_clipping"),
        "bf16.enabled": (half, "train.precision"),
        "data_types.grad_accum_dtype": (
            "fp32",
            "dualtok accumulates gradients in fp32: a small ascent term drowns in bf16",
        ),
    }
    for key, (value, origin) in decided.items():
        _agree(merged, key, value, origin, str(train.deepspeed))
    _check_optimizer(merged, train)
    for section, instead in OWNED_SECTIONS.items():
        if _is_on(merged.get(section)):
            raise ConfigError(f"{train.deepspeed}: {section!r} is set, but the run decides it: use {instead}")
    for section in UNSUPPORTED:
        if _is_on(merged.get(section)):
            raise ConfigError(f"{train.deepspeed}: {section!r} is not supported; take it out")
    if half and zero_stage(merged) == 0:
        raise ConfigError(
            f"{train.deepspeed}: zero_optimization.stage is 0, at which DeepSpeed cannot accumulate the gradients of a "
            "bf16 model in fp32; use stage 1 (ds_configs/zero1.json) or train.precision=fp32"
        )
    merged.setdefault("steps_per_print", 10**9)
    merged.setdefault("zero_allow_untested_optimizer", True)
    return merged


def offload_json(path: str | Path | None, *, on_accelerator: bool) -> Json:
    """Return the DeepSpeed settings of a reference whose parameters lie in host memory.

    Args:
        path: the user's DeepSpeed JSON; None takes stage 3 with parameters in host memory.
        on_accelerator: whether there is a device to copy to, for which host memory is pinned.

    Raises:
        ConfigError: the file's parameters would not be offloaded.
    """
    if path is None:
        return {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": on_accelerator}}}
    given = read_deepspeed_json(path)
    device = given.get("zero_optimization", {}).get("offload_param", {}).get("device", "none")
    if device in ("none", None):
        raise ConfigError(
            f"{path}: has no zero_optimization.offload_param.device, so reference.mode 'offload' would not offload; "
            "add it (cpu or nvme), or use reference.mode=resident"
        )
    return given


def require_tested_deepspeed(installed: str, *, allow_untested: bool) -> None:
    """Refuse a DeepSpeed whose inner workings this engine was never compared with.

    Raises:
        ConfigError: names the version and the ways out.
    """
    if installed not in TESTED_WITH_SHARDED_PIPELINE and not allow_untested:
        raise ConfigError(
            f"train.engine: sharded_pipeline was tested with DeepSpeed {', '.join(TESTED_WITH_SHARDED_PIPELINE)}, but "
            f"{installed} is installed; install that, use train.engine=pipeline, or set "
            "train.pipeline.allow_untested_deepspeed=true and run `make test-parity` first"
        )


def _fit_pipeline(merged: Json, train: TrainConfig) -> None:
    """Check the ZeRO section against the pipeline engine and complete it.

    Raises:
        ConfigError: the stage cannot run under this engine, or a setting has no effect there.
    """
    zero, stage = merged.setdefault("zero_optimization", {}), zero_stage(merged)
    assert train.pipeline is not None
    if train.engine == "pipeline":
        if stage > 1:
            raise ConfigError(
                f"{train.deepspeed}: zero_optimization.stage is {stage}, but train.engine=pipeline keeps whole "
                "gradients until the end of a batch, which stages 2 and 3 partition; use stage 0 or 1, or stage 3 with "
                "train.engine=sharded_pipeline"
            )
        return
    require_tested_deepspeed(version("deepspeed"), allow_untested=train.pipeline.allow_untested_deepspeed)
    if stage != 3:
        raise ConfigError(
            f"{train.deepspeed}: zero_optimization.stage is {stage}, but train.engine=sharded_pipeline shards its "
            "stages with ZeRO-3; make it 3, or use train.engine=pipeline"
        )
    if zero.get("stage3_prefetch_bucket_size", 0) not in (0, "auto"):
        raise ConfigError(
            f"{train.deepspeed}: zero_optimization.stage3_prefetch_bucket_size has no effect with "
            "train.engine=sharded_pipeline: the order of modules in a pipeline does not repeat, so that nothing is "
            "fetched ahead; remove it"
        )
    zero["stage3_prefetch_bucket_size"] = 0
    if "sub_group_size" in zero:
        raise ConfigError(
            f"{train.deepspeed}: zero_optimization.sub_group_size cannot be had with train.engine=sharded_pipeline: "
            "DeepSpeed reduces the gradient's norm over the stages once per sub-group, so that stages with different "
            "numbers of them would wait for each other for ever; remove it"
        )
    zero["sub_group_size"] = 2**62  # one for each group of the optimizer, which every stage has
    if train.pipeline.keep_gathered:
        # Parameters below a threshold stay gathered from one optimizer step to the next; here all of them do.
        zero |= {"stage3_param_persistence_threshold": 2**62, "stage3_model_persistence_threshold": 2**62}


def inference_config(path: str | Path | Json, precision: str, batch_size: int) -> Json:
    """Return the configuration of a forward-only ZeRO-3 engine made from a DeepSpeed JSON file or its content.

    Optimizer, scheduler and monitor settings are left out: they would start a second writer or need gradients.

    Raises:
        ConfigError: the file's ZeRO stage is not 3, the only one that works without an optimizer.
    """
    given = path if isinstance(path, dict) else read_deepspeed_json(path)
    if zero_stage(given) != 3:
        where = "the DeepSpeed settings" if isinstance(path, dict) else path
        raise ConfigError(
            f"{where}: zero_optimization.stage is {zero_stage(given)}; a forward-only engine needs stage 3"
        )
    zero = {key: value for key, value in given["zero_optimization"].items() if key != "offload_optimizer"}
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": 10**9,
    }


def _is_on(section: Any) -> bool:
    """Return whether a section asks for something."""
    return section is not None and not (isinstance(section, dict) and section.get("enabled") is False)


def _check_optimizer(merged: Json, train: TrainConfig) -> None:
    """Compare an ``optimizer`` section with the run's, then drop it: dualtok builds AdamW from the YAML."""
    section = merged.pop("optimizer", None)
    if section is None:
        return
    if str(section.get("type", "")).lower() not in ("adamw", "adam"):
        raise ConfigError(f"{train.deepspeed}: optimizer.type is {section.get('type')!r}; dualtok trains with AdamW")
    wanted = {
        "lr": (train.learning_rate, "train.learning_rate"),
        "eps": (train.epsilon, "train.epsilon"),
        "weight_decay": (train.weight_decay, "train.weight_decay"),
        "betas": (list(train.betas), "train.betas"),
        "adam_w_mode": (True, "dualtok trains with AdamW"),
        "amsgrad": (False, "AdamW without AMSGrad"),
        "bias_correction": (True, "AdamW with bias correction"),
    }
    params = section.get("params", {})
    if not isinstance(params, dict):
        raise ConfigError(f"{train.deepspeed}: optimizer.params is {params!r}, but must be an object {{...}}")
    for key, given in params.items():
        if key in IMPLEMENTATIONS:
            continue
        if key not in wanted:
            raise ConfigError(
                f"{train.deepspeed}: optimizer.params.{key} is no setting of AdamW{did_you_mean(key, wanted)}; correct "
                "it or take it out"
            )
        value, origin = wanted[key]
        _require_equal(given, value, f"optimizer.params.{key}", origin, str(train.deepspeed))


def _agree(merged: Json, dotted: str, value: Any, origin: str, file: str) -> None:
    *parents, last = dotted.split(".")
    node = merged
    for parent in parents:
        node = node.setdefault(parent, {})
    if last in node:
        _require_equal(node[last], value, dotted, origin, file)
    node[last] = value


def _require_equal(given: Any, decided: Any, key: str, origin: str, file: str) -> None:
    if given in ("auto", decided):
        return
    numbers = isinstance(given, int | float) and isinstance(decided, int | float)
    if numbers and math.isclose(given, decided, rel_tol=1e-9):
        return
    raise ConfigError(
        f"{file}: {key} is {given!r}, but the run says {decided!r} ({origin}); make them agree, "
        'or write "auto" in the JSON'
    )
