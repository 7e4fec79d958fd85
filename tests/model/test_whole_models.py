"""A model's folder holds the model of its config.json, or it is refused, in every engine alike."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualtok.config.model import ModelConfig
from dualtok.errors import ConfigError
from dualtok.model.load import load_causal_lm, read_model_config
from dualtok.model.stages import build_stage, stage_names
from tests.support import save_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Tensors = dict[str, torch.Tensor]
EMBEDDING, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"


def changed(tensors: Tensors, **new: Any) -> Tensors:
    return {**tensors, **{name.replace("__", "."): value for name, value in new.items()}}


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "a layer's matrices are missing": (
        lambda s: {name: value for name, value in s.items() if "layers.1.mlp" not in name},
        {},
        r"3 missing \(model\.layers\.1\.mlp\.gate_proj\.weight, model\.layers\.1\.mlp\.up_proj\.weight, ",
    ),
    "one norm is missing": (
        lambda s: {name: value for name, value in s.items() if name != "model.norm.weight"},
        {},
        r"1 missing \(model\.norm\.weight\)",
    ),
    "all names have a prefix": (
        lambda s: {f"module.{name}": value for name, value in s.items()},
        {},
        r"21 missing .*; 21 of no use \(module\.lm_head\.weight",
    ),
    "a matrix has another shape": (
        lambda s: s | {UP: torch.ones(60, 32)},
        {},
        r"1 of another shape \(model\.layers\.1\.mlp\.up_proj\.weight is \(60, 32\), not \(64, 32\)\)",
    ),
    "there is a layer too many": (
        lambda s: s | {f"model.layers.2.{part}": torch.ones(3) for part in ("a", "b")},
        {},
        r"2 of no use \(model\.layers\.2\.a, model\.layers\.2\.b\)",
    ),
    "a value head is left over": (
        lambda s: s | {"v_head.weight": torch.ones(1, 32)},
        {},
        r"1 of no use \(v_head\.weight",
    ),
    "untied, and there is no head": (
        lambda s: {name: value for name, value in s.items() if name != HEAD},
        {},
        r"1 missing \(lm_head\.weight\)",
    ),
    "tied, and there is a head of its own": (
        lambda s: s | {HEAD: s[EMBEDDING] + 0.1},
        {"tie_word_embeddings": True},
        r"says tie_word_embeddings, but lm_head\.weight differs from model\.embed_tokens\.weight",
    ),
    "the config has a layer more": (lambda s: s, {"num_hidden_layers": 3}, r"9 missing \(model\.layers\.2\."),
    "the config is wider": (lambda s: s, {"hidden_size": 64}, r"of another shape \("),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Llama of two layers: 21 tensors."""
    return save_model(tmp_path_factory.mktemp("base") / "base", seed=1, tie_word_embeddings=False)


def variant(base: Path, folder: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """Copy a model with other tensors and other settings."""
    shutil.copytree(base, folder)
    tensors = change(load_file(base / "model.safetensors"))
    save_file({name: value.clone() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def whole(folder: Path) -> Tensors:
    """Return a model's parameters as the engines without stages load them."""
    return dict(load_causal_lm(folder).named_parameters())


def stages(folder: Path) -> Tensors:
    """Return a model's parameters as two stages of a pipeline load them."""
    config, found = read_model_config(folder), {}
    for stage in range(2):
        module, bounds = build_stage(
            folder,
            config,
            ModelConfig(path=str(folder)),
            "layers",
            stage=stage,
            stages=2,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        names = stage_names(load_causal_lm(folder), bounds)
        found |= {names.whole(name, stage): value for name, value in module.named_parameters()}
    return found


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("load", [whole, stages])
def test_what_is_not_the_model_of_its_config_is_refused(
    base: Path, tmp_path: Path, fault: str, load: Callable[[Path], object]
) -> None:
    change, config, message = FAULTS[fault]
    with pytest.raises(ConfigError, match=message) as caught:
        load(variant(base, tmp_path / "model", change, **config))
    assert str(caught.value).startswith(str(tmp_path / "model")), "the folder is named"
    assert "\n" not in str(caught.value)


def test_the_folder_as_it_was_loads(base: Path) -> None:
    one, cut = whole(base), stages(base)
    assert {name: value.tolist() for name, value in one.items()} == {
        name: value.tolist() for name, value in cut.items()
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s,
        lambda s: s | {HEAD: s[EMBEDDING].clone()},
        lambda s: {HEAD if name == EMBEDDING else name: value for name, value in s.items()},
        lambda s: s | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)},
        lambda s: {name.removeprefix("model."): value for name, value in s.items()},
    ],
    ids=["as saved", "an equal copy of the head", "the head alone", "rotary frequencies", "no prefix"],
)
def test_what_is_harmless_gives_the_same_model_everywhere(tmp_path: Path, change: Callable[[Tensors], Tensors]) -> None:
    tied = save_model(tmp_path / "tied", seed=2)
    expected = whole(tied)
    folder = variant(tied, tmp_path / "variant", change)
    for load in (whole, stages):
        found = load(folder)
        for name, value in expected.items():
            assert torch.equal(found[name], value), (load, name)


def other(tmp_path: Path, model_type: str, **settings: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / model_type)
    return tmp_path / model_type


def test_parameters_that_folders_hold_under_other_names_are_looked_for_there(tmp_path: Path) -> None:
    neox = other(tmp_path, "gpt_neox")
    load_causal_lm(neox)
    without = variant(neox, tmp_path / "without", lambda s: {n: v for n, v in s.items() if n != "embed_out.weight"})
    for load in (whole, stages):
        with pytest.raises(ConfigError, match=r"1 missing \(lm_head\.weight\)"):
            load(without)


def test_experts_are_counted_one_by_one(tmp_path: Path) -> None:
    mixtral = other(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2)
    load_causal_lm(mixtral)
    gone = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    without = variant(mixtral, tmp_path / "without", lambda s: {n: v for n, v in s.items() if n != gone})
    with pytest.raises(
        ConfigError, match=r"1 missing \(model\.layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight \(of "
    ):
        load_causal_lm(without)


def test_an_expert_of_another_shape_is_named(tmp_path: Path) -> None:
    mixtral = other(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2)
    odd = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    narrow = variant(mixtral, tmp_path / "narrow", lambda s: s | {odd: torch.ones(32, 40)})
    with pytest.raises(ConfigError, match=r"another shape \(.*experts\.3\.w2\.weight is \(32, 40\), not \(32, 48\)"):
        load_causal_lm(narrow)


def test_files_that_an_index_names_must_be_there_and_whole(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    load_causal_lm(base).save_pretrained(folder, max_shard_size="20KB")
    load_causal_lm(folder)
    last = max(folder.glob("model-*.safetensors"))
    content = last.read_bytes()
    last.write_bytes(content[:100])
    with pytest.raises(ConfigError, match=rf"{last.name}: damaged, or no file of weights"):
        load_causal_lm(folder)
    last.unlink()
    with pytest.raises(ConfigError, match=rf"{last.name}: missing, though the model's index names it"):
        load_causal_lm(folder)


def test_an_adapter_is_not_taken_for_a_model_nor_added_to_one(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds an adapter and no model; .*dualtok export RUN_DIR TARGET --merge"):
        load_causal_lm(tmp_path / "adapter")
    both = tmp_path / "both"
    shutil.copytree(base, both)
    (both / "adapter_config.json").write_text("{}")
    for load in (whole, stages):
        with pytest.raises(ConfigError, match=r"holds an adapter \(adapter_config\.json\) beside a model's weights"):
            load(both)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "sillu"}, r"no 'sillu' is known|sillu"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "zero"),
        ({"model_type": "lama"}, "lama"),
    ],
)
def test_a_config_that_means_nothing_is_one_line(
    base: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = variant(base, tmp_path / "model", lambda s: s, **config)
    with pytest.raises(ConfigError, match=message) as caught:
        load_causal_lm(folder)
    assert str(folder) in str(caught.value)


def test_an_attention_that_an_architecture_lacks_is_told_with_what_helps(tmp_path: Path) -> None:
    folder = other(tmp_path, "gemma2", num_key_value_heads=2, head_dim=8)
    load_causal_lm(folder, attention="eager")
    with pytest.raises(ConfigError, match=r"model\.attention: "):  # it is not installed
        load_causal_lm(folder, attention="flash_attention_2")
