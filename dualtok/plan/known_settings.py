"""The settings of well-known architectures, read without transformers: their keys, defaults, and values that count.

Only what is understood in full is accepted. A key or value out of the ordinary gives None, and the caller asks
transformers, which takes seconds to import but knows every architecture and says what is wrong with a configuration.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Accepts = Callable[[Any], bool]
    Key = tuple[Any, Accepts]

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh")


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _count_or_none(value: Any) -> bool:
    return value is None or _count(value)


def _flag(value: Any) -> bool:
    return type(value) is bool


def _false(value: Any) -> bool:
    return value is False


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _small(value: Any) -> bool:
    """Return whether a value is a number that transformers wants as a float, not an int."""
    return type(value) is float and 0 <= value <= 1


def _activation(value: Any) -> bool:
    return value in ACTIVATIONS


def _text(value: Any) -> bool:
    return type(value) is str


def _token(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _tokens(value: Any) -> bool:
    return _token(value) or _list_of(value, lambda each: each is not None and _token(each))


def _texts(value: Any) -> bool:
    return value is None or _list_of(value, _text)


def _kinds(value: Any) -> bool:
    return value is None or _list_of(value, lambda each: each in ("full_attention", "sliding_attention"))


def _dtype(value: Any) -> bool:
    return value in (None, "float32", "float16", "bfloat16")


def _rope(value: Any) -> bool:
    """Return whether a value describes plain rotary embeddings or those of Llama 3.1."""
    if value is None:
        return True
    if type(value) is not dict or not all(_number(each) for key, each in value.items() if key != "rope_type"):
        return False
    keys = value.keys() - {"rope_type", "rope_theta"}
    if value.get("rope_type", "default") == "default":
        return not keys
    needs = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    return (
        value["rope_type"] == "llama3"
        and keys == needs
        and value["factor"] >= 1
        and value["low_freq_factor"] < value["high_freq_factor"]
        and type(value["original_max_position_embeddings"]) is int
    )


def _partial_rope(value: Any) -> bool:
    """Return whether a value describes rotary embeddings of a part of each head, as GPT-NeoX has them."""
    if type(value) is not dict:
        return value is None
    rest = {key: each for key, each in value.items() if key != "partial_rotary_factor"}
    part = value.get("partial_rotary_factor", 0.25)
    return _share(part) and part > 0 and rest.get("rope_type", "default") == "default" and _rope(rest)


def _list_of(value: Any, accepts: Accepts) -> bool:
    return type(value) is list and all(map(accepts, value))


COMMON: dict[str, Key] = {
    "use_cache": (True, _flag),
    "initializer_range": (0.02, _small),
    "pad_token_id": (None, _token),
}
DECODER: dict[str, Key] = {
    **COMMON,
    "hidden_size": (4096, _count),
    "num_hidden_layers": (32, _count),
    "num_attention_heads": (32, _count),
    "hidden_act": ("silu", _activation),
    "rms_norm_eps": (1e-6, _small),
    "attention_dropout": (0.0, _share),
    "tie_word_embeddings": (False, _flag),
    "rope_parameters": (None, _rope),
}
"""What Llama and its kin share."""
QWEN: dict[str, Key] = {
    **DECODER,
    "vocab_size": (151_936, _count),
    "intermediate_size": (22_016, _count),
    "num_key_value_heads": (32, _count_or_none),
    "max_position_embeddings": (32_768, _count),
    "bos_token_id": (None, _token),
    "eos_token_id": (None, _tokens),
    "use_sliding_window": (False, _flag),
    "sliding_window": (4096, _count_or_none),
    "max_window_layers": (28, _count),
    "layer_types": (None, _kinds),
}
KEYS: dict[str, dict[str, Key]] = {
    "llama": {
        **DECODER,
        "vocab_size": (32_000, _count),
        "intermediate_size": (11_008, _count),
        "num_key_value_heads": (None, _count_or_none),
        "head_dim": (None, _count_or_none),
        "max_position_embeddings": (2048, _count),
        "bos_token_id": (1, _token),
        "eos_token_id": (2, _tokens),
        "pretraining_tp": (1, _count),
        "attention_bias": (False, _flag),
        "mlp_bias": (False, _flag),
    },
    "mistral": {
        **DECODER,
        "vocab_size": (32_000, _count),
        "intermediate_size": (14_336, _count),
        "num_key_value_heads": (8, _count),
        "head_dim": (None, _count_or_none),
        "max_position_embeddings": (131_072, _count),
        "bos_token_id": (1, _token),
        "eos_token_id": (2, _tokens),
        "sliding_window": (4096, _count_or_none),
    },
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": (128, _count), "attention_bias": (False, _flag)},
    "gpt2": {
        **COMMON,
        "vocab_size": (50_257, _count),
        "n_positions": (1024, _count),
        "n_embd": (768, _count),
        "n_layer": (12, _count),
        "n_head": (12, _count),
        "n_inner": (None, _count_or_none),
        "activation_function": ("gelu_new", _activation),
        "resid_pdrop": (0.1, _share),
        "embd_pdrop": (0.1, _share),
        "attn_pdrop": (0.1, _share),
        "layer_norm_epsilon": (1e-5, _small),
        "summary_type": ("cls_index", _text),
        "summary_use_proj": (True, _flag),
        "summary_activation": (None, lambda value: value is None),
        "summary_proj_to_labels": (True, _flag),
        "summary_first_dropout": (0.1, _share),
        "scale_attn_weights": (True, _flag),
        "scale_attn_by_inverse_layer_idx": (False, _flag),
        "reorder_and_upcast_attn": (False, _flag),
        "add_cross_attention": (False, _false),
        "bos_token_id": (50_256, _token),
        "eos_token_id": (50_256, _tokens),
        "tie_word_embeddings": (True, _flag),
    },
    "gpt_neox": {
        **COMMON,
        "vocab_size": (50_432, _count),
        "hidden_size": (6144, _count),
        "num_hidden_layers": (44, _count),
        "num_attention_heads": (64, _count),
        "intermediate_size": (24_576, _count),
        "hidden_act": ("gelu", _activation),
        "attention_dropout": (0.0, _share),
        "hidden_dropout": (0.0, _share),
        "classifier_dropout": (0.1, _share),
        "max_position_embeddings": (2048, _count),
        "layer_norm_eps": (1e-5, _small),
        "bos_token_id": (0, _token),
        "eos_token_id": (2, _tokens),
        "tie_word_embeddings": (False, _flag),
        "use_parallel_residual": (True, _flag),
        "rope_parameters": (None, _partial_rope),
        "attention_bias": (True, _flag),
        "is_decoder": (False, _false),
    },
}
"""Architecture -> setting -> its default in transformers, and which values are understood."""

IN_FILES: dict[str, Accepts] = {
    "architectures": _texts,
    "transformers_version": _text,
    "dtype": _dtype,
    "torch_dtype": _dtype,
}
"""What a ``config.json`` has besides; nothing of it changes a shape."""
OLD_ROPE: dict[str, Accepts] = {"rope_theta": _number, "rope_scaling": _rope}
OLD_KEYS: dict[str, dict[str, Accepts]] = {
    "llama": OLD_ROPE,
    "mistral": OLD_ROPE,
    "qwen2": OLD_ROPE,
    "qwen3": OLD_ROPE,
    "gpt2": {"n_ctx": _count},
    "gpt_neox": {"rotary_emb_base": _number, "rotary_pct": lambda value: _share(value) and value > 0},
}
"""What a ``config.json`` of an earlier version of transformers has."""


def known_settings(given: Mapping[str, Any], *, from_file: bool = False) -> dict[str, Any] | None:
    """Return all settings of a configuration, defaults filled in, where each of them is understood; else None.

    Args:
        given: keys and values as a run's ``model.config`` has them, ``model_type`` among them.
        from_file: accept what stands only in a ``config.json``.
    """
    kind = given.get("model_type")
    if type(kind) is not str or kind not in KEYS:
        return None
    keys = KEYS[kind]
    besides = {**IN_FILES, **OLD_KEYS[kind]} if from_file else {}
    for name, value in given.items():
        accepts = keys[name][1] if name in keys else besides.get(name)
        if name != "model_type" and (accepts is None or not accepts(value)):
            return None
    settings = {name: given.get(name, default) for name, (default, _) in keys.items()}
    return {"model_type": kind, **settings} if _agree(kind, settings) else None


def read_known_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings in the ``config.json`` of a folder, as :func:`known_settings`; None if it cannot be read."""
    try:
        given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return known_settings(given, from_file=True) if isinstance(given, dict) else None


def _agree(kind: str, settings: dict[str, Any]) -> bool:
    """Return whether settings go together: heads share the width evenly, the padding is a row, kinds fit the layers."""
    width, heads, layers = ("n_embd", "n_head", "n_layer") if kind == "gpt2" else STANDARD
    padding, kinds = settings["pad_token_id"], settings.get("layer_types")
    head_width = settings.get("head_dim") or settings[width] // settings[heads]
    return (
        settings[width] % settings[heads] == 0
        and settings[heads] % (settings.get("num_key_value_heads") or settings[heads]) == 0
        and (kind == "gpt2" or head_width % 2 == 0)  # rotary embeddings turn pairs
        and (padding is None or padding < settings["vocab_size"])
        and (kinds is None or len(kinds) == settings[layers])
    )


STANDARD = ("hidden_size", "num_attention_heads", "num_hidden_layers")
"""transformers' usual names of width, heads and layers."""
