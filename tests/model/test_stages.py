"""A model in stages is the model: the same losses and gradients, from weights that each stage reads by itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dualtok.config.model import ModelConfig
from dualtok.data.packing import model_inputs
from dualtok.errors import ConfigError
from dualtok.model.empty import empty_causal_lm
from dualtok.model.load import load_causal_lm, read_model_config
from dualtok.model.losses import TokenLossModel
from dualtok.model.stage_bounds import StageBounds, cut
from dualtok.model.stages import build_stage, stage_layout_of, stage_names
from dualtok.objective import build_objective
from dualtok.train.engines.pipeline import StageModel

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY, LENGTH, LAYERS = 64, 24, 4
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": LENGTH}

ARCHITECTURES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "sdpa", {**GROUPED, "tie_word_embeddings": False}),
    ("llama", "sdpa", {**GROUPED, "tie_word_embeddings": True}),
    ("qwen2", "sdpa", {**SIZES, "num_key_value_heads": 2}),
    # Every other layer sees a window: which one does is looked up by the layer's place in the whole model.
    (
        "qwen2",
        "sdpa",
        {
            **SIZES,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
    ("qwen3", "sdpa", GROUPED),
    ("mistral", "sdpa", {**GROUPED, "sliding_window": 5}),
    ("gemma", "sdpa", GROUPED),
    ("gemma2", "eager", {**GROUPED, "sliding_window": 5, "final_logit_softcapping": 5.0}),
    (
        "gemma3_text",
        "sdpa",
        {**GROUPED, "sliding_window": 5, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    ),
    ("gpt_neox", "sdpa", SIZES),
    ("phi", "sdpa", SIZES),
    ("phi3", "sdpa", {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}),
    ("olmo", "sdpa", SIZES),
    ("olmo2", "sdpa", SIZES),
    ("gpt2", "sdpa", GPT2),
]


def save(folder: Path, model_type: str, **settings: Any) -> Path:
    """Save a freshly drawn model and return its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=VOCABULARY, **settings))
    with torch.no_grad():  # norms and biases away from 1 and 0, so that a forgotten one shows
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return folder


def packed_batch() -> dict[str, torch.Tensor]:
    """Return two blocks of several documents each."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH)).astype(np.int32)
    return model_inputs(ids, [np.array([9, 15]), np.array([14, 6])])


def stages_of(folder: Path, stages: int, balance: Any = "cost", **model: Any) -> list[StageModel]:
    """Build every stage of a model, as the ranks of a job would each build one."""
    config = read_model_config(folder)
    settings = ModelConfig(path=str(folder), **model)
    built = []
    for stage in range(stages):
        causal_lm, bounds = build_stage(
            folder,
            config,
            settings,
            balance,
            stage=stage,
            stages=stages,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        built.append(StageModel(causal_lm, bounds[stage], build_objective("causal_lm"), None))
    return built


def run_through(stages: list[StageModel], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hand the hidden states from stage to stage; returns what the last one does."""
    passed = batch["input_ids"]
    for stage in stages:
        stage.batch = batch
        passed = stage(passed)
    return passed


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(("model_type", "attention", "settings"), ARCHITECTURES)
def test_stages_give_the_losses_and_gradients_of_the_whole_model(
    tmp_path: Path, model_type: str, attention: str, settings: dict[str, Any], stages: int
) -> None:
    folder = save(tmp_path / "model", model_type, **settings)
    whole = TokenLossModel(load_causal_lm(folder, attention=attention)).eval()
    cut_up = [stage.eval() for stage in stages_of(folder, stages, attention=attention)]
    batch = packed_batch()
    expected, found = whole(batch), run_through(cut_up, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    expected.sum().backward()
    found.sum().backward()
    known = {name: parameter.grad for name, parameter in whole.causal_lm.named_parameters()}
    sums: dict[str, torch.Tensor] = {}
    for number, stage in enumerate(cut_up):
        names = stage_names(stage.causal_lm, [each.bounds for each in cut_up])
        for name, parameter in stage.causal_lm.named_parameters():
            whole_name = names.whole(name, number)
            if whole_name not in known:  # a tied head, which the uncut model has under the embeddings' name
                whole_name = next(key for key in known if parameter.shape == known[key].shape)
            sums[whole_name] = sums.get(whole_name, torch.zeros(())) + parameter.grad
    assert sums.keys() == known.keys()
    for name, gradient in known.items():
        torch.testing.assert_close(sums[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_activation_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama", **GROUPED)
    gradients = []
    for checkpointing in (False, True):
        stages = [stage.train() for stage in stages_of(folder, 2, activation_checkpointing=checkpointing)]
        run_through(stages, packed_batch()).backward()
        gradients.append([p.grad for stage in stages for p in stage.parameters()])
        assert stages[0].causal_lm.is_activation_checkpointing == checkpointing
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_every_weight_is_on_one_stage_alone(tmp_path: Path) -> None:
    """But for the tied one, which the first and the last hold."""
    folder = save(tmp_path / "model", "llama", **GROUPED, tie_word_embeddings=False)
    stages = stages_of(folder, 2)
    sizes = [sum(p.numel() for p in stage.parameters()) for stage in stages]
    whole = sum(value.numel() for value in load_file(folder / "model.safetensors").values())
    assert sum(sizes) == whole
    assert max(sizes) < 0.6 * whole
    assert not any(p.is_meta for stage in stages for p in stage.parameters())
    assert not any(b.is_meta for stage in stages for b in stage.buffers())


def test_dropout_of_the_embeddings_belongs_to_the_first_stage(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "gpt2", **GPT2, embd_pdrop=0.5, attn_pdrop=0.0, resid_pdrop=0.0)
    _, last = (stage.train() for stage in stages_of(folder, 2))
    last.batch = packed_batch()
    hidden = torch.randn(2, LENGTH, 32)
    torch.testing.assert_close(last(hidden), last(hidden))


@pytest.mark.parametrize(
    ("costs", "head", "stages", "balance", "expected"),
    [
        ([1, 1, 1, 1], 0, 2, "cost", [2, 2]),
        ([1, 1, 1, 1], 0, 4, "cost", [1, 1, 1, 1]),
        ([1, 1, 1, 1, 1, 1], 2, 2, "cost", [4, 2]),
        ([1] * 8, 100, 4, "cost", [2, 2, 3, 1]),
        ([5, 1, 1, 1], 0, 2, "cost", [1, 3]),
        ([1] * 7, 50, 3, "layers", [3, 2, 2]),
        ([1] * 4, 50, 2, (3, 1), [3, 1]),
    ],
)
def test_layers_are_dealt_to_stages(costs: list[int], head: int, stages: int, balance: Any, expected: Any) -> None:
    bounds = cut(costs, head, stages, balance)
    assert [each.stop - each.first for each in bounds] == expected
    assert [each.first for each in bounds] == [sum(expected[:i]) for i in range(stages)]


def test_the_cheapest_cut_is_as_cheap_as_the_best_of_all() -> None:
    """The dearest stage is as cheap as in the best of all possible cuts."""
    from itertools import combinations

    rng = np.random.default_rng(0)
    for _ in range(200):
        n, stages, head = int(rng.integers(2, 8)), int(rng.integers(2, 5)), int(rng.integers(0, 20))
        if stages > n:
            continue
        costs = rng.integers(1, 10, n).tolist()

        def dearest(starts: tuple[int, ...], costs: list[int] = costs, head: int = head, n: int = n) -> int:
            ends = [*starts[1:], n]
            sums = [sum(costs[a:b]) for a, b in zip(starts, ends, strict=True)]
            return max([*sums[:-1], sums[-1] + head])

        best = min(dearest((0, *inner)) for inner in combinations(range(1, n), stages - 1))
        assert dearest(tuple(each.first for each in cut(costs, head, stages, "cost"))) == best


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"5 stages for a model of 4 decoder layers"):
        cut([1] * 4, 0, 5, "cost")
    with pytest.raises(ConfigError, match=r"\[3, 2\] sums to 5, but the model has 4 layers"):
        cut([1] * 4, 0, 2, (3, 2))


def test_an_architecture_without_a_plan_is_refused() -> None:
    from transformers import AutoConfig

    with pytest.raises(ConfigError, match=r"no pipeline plan for 'opt'.*train.engine=zero"):
        stage_layout_of(AutoConfig.for_model("opt"))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama", **GROUPED)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    missing = {key: value for key, value in weights.items() if key != name}
    save_file(missing, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 missing \(model\.layers\.3\.mlp\.up_proj\.weight\)"):
        stages_of(folder, 2)
    save_file(
        {**weights, name: weights[name][:-1].contiguous()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ConfigError, match=r"up_proj\.weight is \(47, 32\), not \(48, 32\)"):
        stages_of(folder, 2)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="needs safetensors"):
        stages_of(folder, 2)


def test_weights_in_several_files_are_found(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama", **GROUPED)
    expected = run_through([stage.eval() for stage in stages_of(folder, 2)], packed_batch())
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {}
    for number, (name, value) in enumerate(weights.items()):
        save_file({name: value}, folder / f"part-{number}.safetensors")
        files[name] = f"part-{number}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    found = run_through([stage.eval() for stage in stages_of(folder, 2)], packed_batch())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_empty_model_has_shapes_and_buffers_but_no_memory() -> None:
    from transformers import AutoConfig

    model = empty_causal_lm(AutoConfig.for_model("llama", vocab_size=VOCABULARY, **GROUPED), "sdpa", real_buffers=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_bounds_know_their_ends() -> None:
    assert StageBounds(0, 2, 0, 2).is_first
    assert not StageBounds(0, 2, 0, 2).is_last
    assert StageBounds(1, 2, 2, 4).is_last
