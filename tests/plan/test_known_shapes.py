"""Shapes from settings alone against the model that transformers builds: names, shapes, defaults, what is accepted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from dualtok.model.adapters import linear_layers
from dualtok.plan.known_settings import ACTIVATIONS, KEYS, OLD_KEYS, known_settings, read_known_settings
from dualtok.plan.known_shapes import FAMILIES, known_shape, parameters_of
from dualtok.plan.shape import read_shape
from dualtok.plan.shapes import NAMED

if TYPE_CHECKING:
    from pathlib import Path

DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 48}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **DECODER},
    "llama-grouped": {"model_type": "llama", **DECODER, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", **DECODER, "attention_bias": True, "mlp_bias": True},
    "llama-wide-heads": {"model_type": "llama", **DECODER, "head_dim": 12, "num_key_value_heads": 1, "pad_token_id": 3},
    "llama-3.1": {"model_type": "llama", **DECODER, "rope_parameters": LLAMA3_ROPE},
    "mistral": {"model_type": "mistral", **DECODER, "num_key_value_heads": 2, "head_dim": None},
    "mistral-wide-heads": {
        "model_type": "mistral",
        **DECODER,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    "qwen2": {"model_type": "qwen2", **DECODER, "num_key_value_heads": 2},
    "qwen2-tied": {
        "model_type": "qwen2",
        **DECODER,
        "num_key_value_heads": None,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **DECODER, "num_key_value_heads": 2},
    "qwen3-biases": {
        "model_type": "qwen3",
        **DECODER,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2-untied": {"model_type": "gpt2", **GPT2, "n_inner": 40, "tie_word_embeddings": False},
    "gpt_neox": {"model_type": "gpt_neox", **DECODER},
    "gpt_neox-tied": {"model_type": "gpt_neox", **DECODER, "attention_bias": False, "tie_word_embeddings": True},
}


def transformers_config(settings: dict[str, Any]) -> Any:
    return AutoConfig.for_model(**json.loads(json.dumps(settings)))  # a copy: it changes what it is given


def known(settings: dict[str, Any]) -> dict[str, Any]:
    found = known_settings(settings)
    assert found is not None
    return found


def built_parameters(config: Any) -> list[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_those_of_the_built_model(name: str) -> None:
    settings, config = known(CASES[name]), transformers_config(CASES[name])
    assert list(parameters_of(settings).named()) == built_parameters(config)
    assert parameters_of(settings).targets() == tuple(linear_layers(config))


@pytest.mark.parametrize("name", CASES)
def test_the_shape_is_the_one_read_from_the_built_model(name: str) -> None:
    settings, config = known(CASES[name]), transformers_config(CASES[name])
    assert known_shape(settings) == read_shape(config)
    targets = parameters_of(settings).targets()
    for some in (targets, targets[:1]):
        assert known_shape(settings, rank=3, targets=some) == read_shape(config, rank=3, targets=some)


@pytest.mark.parametrize("name", NAMED)
def test_every_named_model_is_known(name: str) -> None:
    small = {**NAMED[name], ("n_layer" if "n_layer" in NAMED[name] else "num_hidden_layers"): 2}
    assert known_shape(known(small)) == read_shape(transformers_config(small))
    assert known_settings(NAMED[name]) is not None


@pytest.mark.parametrize("kind", KEYS)
def test_keys_and_defaults_are_transformers(kind: str) -> None:
    theirs = AutoConfig.for_model(kind)
    fields = {field: getattr(type(theirs)(), field) for field in theirs.to_dict()}
    assert KEYS[kind].keys() <= fields.keys()
    assert not OLD_KEYS[kind].keys() & fields.keys()
    filled = {"head_dim", "num_key_value_heads", "rope_parameters", "layer_types"}  # from others, where they are None
    for key, (default, accepts) in KEYS[kind].items():
        assert accepts(default), key
        if key == "sliding_window" and kind != "mistral":
            continue  # None unless use_sliding_window
        assert default == fields[key] or (default is None and key in filled), key
    assert FAMILIES.keys() == KEYS.keys()


def test_the_activations_exist() -> None:
    assert set(ACTIVATIONS) <= ACT2FN.keys()


ARCHITECTURES = st.sampled_from(sorted(KEYS))
COUNT = st.integers(1, 9)


@st.composite
def drawn_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a configuration with any of the settings that count, which need not go together."""
    kind = draw(ARCHITECTURES)
    width, heads, layers = ("n_embd", "n_head", "n_layer")
    if kind != "gpt2":
        width, heads, layers = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    settings: dict[str, Any] = {"model_type": kind, "vocab_size": draw(COUNT), layers: draw(st.integers(1, 3))}
    settings |= {heads: draw(COUNT), "pad_token_id": draw(st.none() | st.integers(0, 4))}
    settings[width] = settings[heads] * draw(COUNT) + draw(st.sampled_from((0, 0, 0, 1)))
    sizes = {
        "intermediate_size",
        "n_inner",
        "n_positions",
        "max_position_embeddings",
        "num_key_value_heads",
        "head_dim",
    }
    flags = {"tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"}
    for key in sorted(KEYS[kind].keys() & sizes):
        settings[key] = draw(COUNT)
    for key in sorted(KEYS[kind].keys() & flags):
        settings[key] = draw(st.booleans())
    return settings


@given(drawn_settings())
def test_what_is_accepted_has_the_shape_of_the_built_model(drawn: dict[str, Any]) -> None:
    settings = known_settings(drawn)
    assume(settings is not None)
    assert settings is not None
    config = transformers_config(drawn)
    assert list(parameters_of(settings).named()) == built_parameters(config)
    assert known_shape(settings) == read_shape(config)


UNUSUAL: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"model_type": "phi"}),
    ("llama", {"model_type": ["llama"]}),
    ("llama", {"hiden_size": 32}),
    ("llama", {"rope_theta": 1e6}),  # of a config.json alone
    ("llama", {"hidden_act": "sillu"}),
    ("llama", {"hidden_size": 33}),
    ("llama", {"hidden_size": 32.0}),
    ("llama", {"hidden_size": True}),
    ("llama", {"num_hidden_layers": 0}),
    ("llama", {"num_key_value_heads": 3}),
    ("llama", {"head_dim": 9}),
    ("llama", {"pad_token_id": 96}),
    ("llama", {"pad_token_id": -1}),
    ("llama", {"rms_norm_eps": "1e-5"}),
    ("llama", {"rms_norm_eps": float("nan")}),
    ("llama", {"attention_dropout": 1.5}),
    ("llama", {"tie_word_embeddings": "yes"}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}),
    ("llama", {"rope_parameters": [1]}),
    ("llama", {"quantization_config": {"load_in_4bit": True}}),
    ("mistral", {"num_key_value_heads": None}),
    ("qwen3", {"layer_types": ["full_attention"]}),
    ("qwen3", {"layer_types": ["full_attention", "no_attention"]}),
    ("qwen2", {"head_dim": 8}),
    ("gpt2", {"add_cross_attention": True}),
    ("gpt2", {"hidden_size": 32}),
    ("gpt_neox", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}),
]


@pytest.mark.parametrize(("name", "changes"), UNUSUAL)
def test_what_is_out_of_the_ordinary_is_left_to_transformers(name: str, changes: dict[str, Any]) -> None:
    assert known_settings({**CASES[name], **changes}) is None
    assert known_settings(CASES[name]) is not None


@pytest.mark.parametrize("name", CASES)
def test_a_saved_configuration_is_read(tmp_path: Path, name: str) -> None:
    config = transformers_config(CASES[name])
    config.architectures = ["SomeForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    settings = read_known_settings(tmp_path)
    assert settings is not None
    assert known_shape(settings) == read_shape(AutoConfig.from_pretrained(tmp_path))


OLD_FILES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_scaling": LLAMA3_ROPE,
        "rope_theta": 5e5,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43",
    },
    "mistral": {"rope_theta": 10_000.0, "torch_dtype": "bfloat16"},
    "qwen2": {"rope_theta": 1_000_000.0, "rope_scaling": None},
    "gpt2": {"n_ctx": 48, "architectures": ["GPT2LMHeadModel"]},
    "gpt_neox": {"rotary_emb_base": 10_000, "rotary_pct": 0.25, "torch_dtype": "float16"},
}


@pytest.mark.parametrize("name", OLD_FILES)
def test_a_configuration_of_an_earlier_version_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CASES[name], **OLD_FILES[name]}))
    settings = read_known_settings(tmp_path)
    assert settings is not None
    assert known_shape(settings) == read_shape(AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}', "\xff"])
def test_a_file_that_is_none_or_wants_code_is_left_to_transformers(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert read_known_settings(tmp_path) is None
    assert read_known_settings(tmp_path / "missing") is None
