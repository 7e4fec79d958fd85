"""Hugging Face causal language models in: their configuration, and their weights once these are seen to be whole."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError

from dualtok.errors import ConfigError, did_you_mean
from dualtok.model.adapters import CONFIG_FILE
from dualtok.model.empty import NO_MODEL, empty_causal_lm
from dualtok.model.folder.weights import WeightFiles, model_folder
from dualtok.model.own_code import needs_own_code, refusal
from dualtok.objective.chunked_cross_entropy import LogitScaling

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from dualtok.config.model import ModelConfig

# Imported where they are used, for what they take to load: transformers (1 to 4 s).

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def read_model_config(
    path: str | Path, *, trust_remote_code: bool = False, setting: str = "model.trust_remote_code"
) -> PretrainedConfig:
    """Read the ``config.json`` of a Hugging Face folder or hub name.

    Args:
        path: the folder or name.
        trust_remote_code: run Python code that it brings.
        setting: what allows that, for the error.

    Raises:
        ConfigError: there is no such folder or hub model, its config is not one that transformers knows, or it needs
            code that is not trusted.
    """
    from transformers import AutoConfig

    _require_no_adapter(Path(path))
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"{path}: not a Hugging Face model folder (no config.json); write one with `dualtok export`")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, *NO_MODEL, StrictDataclassError) as error:
        if needs_own_code(error):
            raise refusal(path, setting) from None
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: neither a model folder nor a hub model that can be read: {reason}") from None
    config._attn_implementation = None  # it may name a kernel, that is code, on the hub; the run's setting counts alone
    return config


def _require_no_adapter(folder: Path) -> None:
    """Refuse a folder with a peft adapter: transformers would add it to the weights there, or look for its base."""
    if not (folder / CONFIG_FILE).is_file():
        return
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: holds an adapter and no model; write the whole model with `dualtok export RUN_DIR TARGET "
            "--merge` (or peft's merge_and_unload) and give that folder"
        )
    raise ConfigError(
        f"{folder}: holds an adapter ({CONFIG_FILE}) beside a model's weights; if it is merged into them, remove its "
        "files from the folder, else merge it with peft's merge_and_unload and give the result"
    )


def starting_config(model: ModelConfig, vocabulary: int) -> PretrainedConfig:
    """Return the configuration of the model that training starts from.

    Args:
        model: pretrained weights or a configuration.
        vocabulary: rows that the tokenizer needs, used where ``model.config`` leaves ``vocab_size`` out.

    Raises:
        ConfigError: the folder cannot be read, or ``model.config`` has an unknown architecture, key or value.
    """
    if model.path is not None:
        return read_model_config(model.path, trust_remote_code=model.trust_remote_code)
    from transformers import CONFIG_MAPPING, AutoConfig

    settings: dict[str, Any] = {"vocab_size": vocabulary, **(model.config or {})}
    model_type = str(settings.pop("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"model.config: no model_type {model_type!r}{did_you_mean(model_type, CONFIG_MAPPING)}")
    known = AutoConfig.for_model(model_type).to_dict()
    for key in settings:
        if key not in known:
            raise ConfigError(f"model.config: {model_type} has no setting {key!r}{did_you_mean(key, known)}")
    try:
        config = AutoConfig.for_model(model_type, **settings)
    except (*NO_MODEL, StrictDataclassError) as error:
        raise ConfigError(f"model.config: {' '.join(str(error).split())[:200]}") from None
    config.architectures = None
    return config


def load_causal_lm(
    path: Path | str,
    *,
    precision: str = "fp32",
    attention: str = "sdpa",
    activation_checkpointing: bool = False,
    quantize: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model that honours the position-based document boundaries of packed blocks.

    Under an active ``HfDeepSpeedConfig`` of ZeRO stage 3 the weights are partitioned while they are read.

    Args:
        path: Hugging Face folder or hub name.
        precision: ``fp32`` or ``bf16``.
        attention: attention implementation.
        activation_checkpointing: recompute each layer's activations in the backward pass.
        quantize: ``nf4`` keeps the weights of linear layers in 4 bits; they cannot be trained then.
        trust_remote_code: run Python code that the model brings.

    Raises:
        ConfigError: the folder does not hold exactly the model that its ``config.json`` describes
            (:class:`.folder.weights.WeightFiles`), it needs code that is not trusted, its architecture takes no
            ``position_ids``, or bitsandbytes is missing.
    """
    from transformers import AutoModelForCausalLM

    extra = {} if quantize is None else {"quantization_config": _nf4(precision)}
    # A local folder: transformers would ask a service of the hub to convert pickled weights of a hub name.
    folder = model_folder(path)
    config = read_model_config(folder, trust_remote_code=trust_remote_code, setting="trust_remote_code of its section")
    empty = empty_causal_lm(config, attention, origin=f"{path}/config.json")
    WeightFiles(folder, empty)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[precision],
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            weights_only=True,
            **extra,
        )
    except (OSError, ImportError, *NO_MODEL) as error:
        raise ConfigError(f"{path}: the model cannot be loaded: {' '.join(str(error).split())[:240]}") from None
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise ConfigError(
            f"{path}: {type(model).__name__} takes no position_ids, so attention cannot stop at document boundaries; "
            "choose an architecture with explicit positions (Llama, GPT-NeoX, GPT-2, Qwen, ...)"
        )
    model.config.use_cache = False
    if activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


def _nf4(precision: str) -> object:
    """Return transformers' settings of 4-bit weights: NF4 with doubly quantized scales, as QLoRA has them."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("model.quantize: needs the package bitsandbytes; pip install 'dualtok[qlora]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[precision],
    )


def logit_scaling(config: PretrainedConfig) -> LogitScaling:
    """Return what the architecture does to its logits after ``lm_head`` (scale, soft cap).

    :func:`dualtok.model.losses.check_errors` compares the result with the model's own forward pass.
    """
    text = config.get_text_config()
    multiply, divide = getattr(text, "logit_scale", None), getattr(text, "logits_scaling", None)
    factor = (1.0 if multiply is None else float(multiply)) / (1.0 if divide is None else float(divide))
    return LogitScaling(factor, getattr(text, "final_logit_softcapping", None) or None)
