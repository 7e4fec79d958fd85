"""Weights drawn piece by piece are those that transformers itself would draw, and never whole in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from dualtok.config.model import ModelConfig
from dualtok.errors import ConfigError
from dualtok.model.fresh import write_fresh_weights
from dualtok.model.load import load_causal_lm, starting_config
from tests.support import ROOT, VOCABULARY, environment, read_weights, tiny_llama_config

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"pad_token_id": 0},
    "olmo2": {},
    "phi": {},
    "gpt_neox": {"tie_word_embeddings": False},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
}


def small_config(architecture: str, **changes: Any) -> PretrainedConfig:
    """Return a small configuration; the shape's names that an architecture does not have are left out."""
    known = AutoConfig.for_model(architecture).to_dict()
    shape = {} if architecture == "gpt2" else {key: value for key, value in SHAPE.items() if key in known}
    settings = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, **shape, **ARCHITECTURES[architecture]}
    return AutoConfig.for_model(architecture, **{**settings, **changes})


def same_distribution(drawn: torch.Tensor, expected: torch.Tensor) -> bool:
    """Compare constants exactly, means and deviations within five standard errors."""
    assert drawn.shape == expected.shape
    deviation = float(expected.std())
    if deviation == 0.0:
        return bool(torch.equal(drawn, expected))
    error = 5 * deviation / expected.numel() ** 0.5
    return abs(float(drawn.mean() - expected.mean())) < 1.5 * error and abs(float(drawn.std()) - deviation) < error


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_weight_has_the_distribution_that_transformers_gives_it(architecture: str, tmp_path: Path) -> None:
    config = small_config(architecture)
    write_fresh_weights(config, 1, tmp_path / "ours", shard_bytes=100_000)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        theirs = AutoModelForCausalLM.from_config(small_config(architecture))
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=False)
    expected, drawn = read_weights(tmp_path / "theirs"), read_weights(tmp_path / "ours")
    assert drawn.keys() == expected.keys()
    wrong = [name for name in expected if not same_distribution(drawn[name], expected[name])]
    assert not wrong
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in drawn.items())
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == bool(loaded.config.tie_word_embeddings)
    ids = torch.arange(32)[None]
    losses = [model(input_ids=ids, labels=ids).loss.item() for model in (loaded, theirs)]
    assert abs(losses[0] - losses[1]) < 0.3


def test_gpt2_scales_the_projections_on_its_residual_path(tmp_path: Path) -> None:
    write_fresh_weights(small_config("gpt2"), 1, tmp_path)
    weights = read_weights(tmp_path)
    for part in ("attn", "mlp"):
        scaled = float(weights[f"transformer.h.1.{part}.c_proj.weight"].std())
        assert scaled == pytest.approx(0.02 / 6**0.5, rel=0.1)
    assert float(weights["transformer.h.1.attn.c_attn.weight"].std()) == pytest.approx(0.02, rel=0.1)


def test_a_padding_id_has_no_embedding_even_when_the_head_shares_it(tmp_path: Path) -> None:
    config = small_config("gemma2", tie_word_embeddings=True)
    write_fresh_weights(config, 1, tmp_path)
    embedding = read_weights(tmp_path)["model.embed_tokens.weight"]
    assert not embedding[0].any()
    assert embedding[1:].any(dim=1).all()


def test_fresh_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    config = starting_config(ModelConfig(config=tiny_llama_config()), VOCABULARY)
    for name, seed, before, size in (("a", 1, 5, 10**9), ("b", 1, 6, 20_000), ("c", 2, 5, 10**9)):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        write_fresh_weights(config, seed, tmp_path / name, shard_bytes=size)
        assert torch.equal(torch.get_rng_state(), state)
    write_fresh_weights(config, 1, tmp_path / "half", dtype=torch.bfloat16)
    a, b, c, half = (read_weights(tmp_path / name) for name in ("a", "b", "c", "half"))
    assert a.keys() == b.keys() == half.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(a[name].bfloat16(), half[name]) for name in a)
    random = [name for name in a if "norm" not in name]
    assert all(not torch.equal(a[name], c[name]) for name in random)
    layers = [a[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1)]
    assert not torch.equal(*layers)


def test_files_are_sharded_and_an_earlier_model_leaves_none_behind(tmp_path: Path) -> None:
    config = small_config("llama")
    write_fresh_weights(config, 1, tmp_path, shard_bytes=50_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    weights = read_weights(tmp_path)
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in weights.values())
    model = load_causal_lm(tmp_path)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    write_fresh_weights(config, 1, tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


def test_the_folder_names_its_architecture_and_dtype(tmp_path: Path) -> None:
    write_fresh_weights(small_config("llama"), 1, tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert (tmp_path / "generation_config.json").is_file()


def test_a_configuration_that_describes_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model can be built"):
        write_fresh_weights(small_config("llama", head_dim=-16), 1, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_architecture_that_leaves_a_weight_to_chance_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("apertus", **{k: v for k, v in SHAPE.items() if k != "head_dim"})
    with pytest.raises(ConfigError, match=r"draws no value for model\.layers\.0\.mlp\.act_fn\.alpha_p"):
        write_fresh_weights(config, 1, tmp_path)


MEASURE = """
import sys, torch
from pathlib import Path
from transformers import AutoConfig
from dualtok.model.fresh import meta_model, write_fresh_weights
def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
config = AutoConfig.for_model("llama", hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, vocab_size=8192)
tiny = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=512)
write_fresh_weights(tiny, 0, Path(sys.argv[1]) / "tiny")
bytes_ = 4 * sum(p.numel() for p in meta_model(config).parameters())
before = peak()
write_fresh_weights(config, 0, Path(sys.argv[1]) / "large", shard_bytes=64 * 2**20)
print(bytes_, peak() - before)
"""


@pytest.mark.slow
def test_the_peak_of_memory_is_a_file_and_not_the_model(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    model, peak = map(int, result.stdout.split()[-2:])
    assert model > 600 * 2**20
    assert peak < 64 * 2**20 + 4 * 8192 * 1024 + 48 * 2**20, f"peak {peak / 2**20:.0f} MiB of {model / 2**20:.0f} MiB"
