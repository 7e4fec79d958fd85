"""Hugging Face causal language models in: checked against tokenizer and blocks before any weight is read."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dualtok.errors import ConfigError, did_you_mean
from dualtok.objective.linear_cross_entropy import LogitScaling

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from dualtok.model.config import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def read_model_config(path: str | Path) -> PretrainedConfig:
    """Read the ``config.json`` of a Hugging Face folder or hub name.

    Raises:
        ConfigError: there is no such folder or hub model, or its config is not one that transformers knows.
    """
    from transformers import AutoConfig

    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"{path}: not a Hugging Face model folder (no config.json); write one with `dualtok export`")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: neither a model folder nor a hub model that can be read: {reason}") from None


def check_fits(config: PretrainedConfig, *, vocabulary: int, block_length: int, origin: str) -> None:
    """Refuse a model that cannot take the prepared blocks.

    Args:
        config: the model's configuration.
        vocabulary: number of ids of the tokenizer that made the blocks.
        block_length: tokens per block.
        origin: names the model in errors.

    Raises:
        ConfigError: the vocabulary is smaller than the tokenizer's, or the blocks are longer than the positions.
    """
    text = config.get_text_config()
    if text.vocab_size < vocabulary:
        raise ConfigError(
            f"{origin}: vocab_size is {text.vocab_size}, but the tokenizer of the blocks has {vocabulary} ids; "
            "raise vocab_size or prepare the data with the model's own tokenizer (data.tokenizer)"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and positions < block_length:
        raise ConfigError(
            f"{origin}: max_position_embeddings is {positions}, but data.block_length is {block_length}; "
            "raise the former or prepare shorter blocks"
        )


def check_same_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, *, origin: str) -> None:
    """Refuse a model whose own tokenizer gives other ids than the one that made the blocks.

    A folder without a tokenizer passes: the sizes alone can be compared then (:func:`check_fits`).

    Raises:
        ConfigError: names a token that the two number differently.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return
    theirs = AutoTokenizer.from_pretrained(folder).get_vocab()
    for token, index in tokenizer.get_vocab().items():
        if theirs.get(token) != index:
            raise ConfigError(
                f"{origin}: its tokenizer has another vocabulary than the blocks': {token!r} is {theirs.get(token)} "
                f"there and {index} in the blocks; prepare the data with its tokenizer (data.tokenizer), or choose "
                "another model"
            )


def starting_config(model: ModelConfig, vocabulary: int) -> PretrainedConfig:
    """Return the configuration of the model that training starts from.

    Args:
        model: pretrained weights or a configuration.
        vocabulary: ids of the tokenizer, used where ``model.config`` leaves ``vocab_size`` out.

    Raises:
        ConfigError: the folder cannot be read, or ``model.config`` has an unknown architecture, key or value.
    """
    if model.path is not None:
        return read_model_config(model.path)
    from huggingface_hub.errors import StrictDataclassError
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
    except (ValueError, KeyError, TypeError, ZeroDivisionError, StrictDataclassError) as error:
        raise ConfigError(f"model.config: {' '.join(str(error).split())[:200]}") from None
    config.architectures = None
    return config


def load_causal_lm(
    path: Path | str, *, precision: str = "fp32", attention: str = "sdpa", activation_checkpointing: bool = False,
    quantise: str | None = None,
) -> PreTrainedModel:  # fmt: skip
    """Load a causal language model that honours the position-based document boundaries of packed blocks.

    Under an active ``HfDeepSpeedConfig`` of ZeRO stage 3 the weights are partitioned while they are read.

    Args:
        path: Hugging Face folder or hub name.
        precision: ``fp32`` or ``bf16``.
        attention: attention implementation.
        activation_checkpointing: recompute each layer's activations in the backward pass.
        quantise: ``nf4`` keeps the weights of linear layers in 4 bits; they cannot be trained then.

    Raises:
        ConfigError: the model cannot be read, its architecture takes no ``position_ids``, or bitsandbytes is missing.
    """
    from transformers import AutoModelForCausalLM

    extra = {} if quantise is None else {"quantization_config": _nf4(precision)}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[precision], attn_implementation=attention, **extra
        )
    except (OSError, ValueError, ImportError) as error:
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
    """Return transformers' settings of 4-bit weights: NF4 with doubly quantised scales, as QLoRA has them."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("model.quantise: needs the package bitsandbytes; pip install 'dualtok[qlora]'")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[precision],
    )  # fmt: skip


def logit_scaling(config: PretrainedConfig) -> LogitScaling:
    """Return what the architecture does to its logits after ``lm_head`` (scale, soft cap).

    :func:`dualtok.model.losses.probe_errors` compares the result with the model's own forward pass.
    """
    text = config.get_text_config()
    multiply, divide = getattr(text, "logit_scale", None), getattr(text, "logits_scaling", None)
    factor = (1.0 if multiply is None else float(multiply)) / (1.0 if divide is None else float(divide))
    return LogitScaling(factor, getattr(text, "final_logit_softcapping", None) or None)
