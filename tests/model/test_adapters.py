"""Adapters: on top of a frozen base, the same in every layout, switched without a trace, read as peft wrote them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from dualtok.commands.export import trained_norms
from dualtok.config.model import Ia3Config, LoraConfig
from dualtok.errors import ConfigError
from dualtok.model.adapters import (
    REFERENCE,
    TRAINED,
    WEIGHTS_FILE,
    activate,
    adapter_weights,
    linear_layers,
    lora_layers,
    prepare_adapters,
    require_same_base,
    write_adapter,
)

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 97
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}
TARGETS = {
    "llama": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "gpt_neox": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
}


def config_of(model_type: str) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **ARCHITECTURES[model_type], vocab_size=VOCABULARY)


def build(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(model_type)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None] % VOCABULARY, use_cache=False).logits


def plan(model_type: str = "llama", reference: Path | None = None, **lora: Any) -> Any:
    settings = LoraConfig(**{"rank": 3, "alpha": 6, **lora})
    folder = None if reference is None else str(reference)
    return prepare_adapters(settings, config_of(model_type), seed=5, base="base", reference=folder)


def disturb(model: nn.Module, name: str) -> None:
    """Give an adapter an effect: B starts as 0."""
    torch.manual_seed(9)
    for key, parameter in model.named_parameters():
        if f"lora_B.{name}" in key:
            nn.init.normal_(parameter, std=0.3)


@pytest.fixture(params=ARCHITECTURES)
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def peft_adapter(tmp_path: Path, model_type: str) -> tuple[Path, torch.Tensor]:
    """Return a folder that peft itself wrote, and its logits by peft."""
    model = build(model_type)
    target = TARGETS[model_type][0]
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM", fan_in_fan_out=model_type == "gpt2")
    )
    disturb(wrapped, "default")
    wrapped.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", logits(wrapped)


def test_every_linear_layer_of_the_decoder_is_a_target_and_the_head_is_not(model_type: str) -> None:
    assert linear_layers(config_of(model_type)) == TARGETS[model_type]


def test_the_trained_adapter_the_bare_base_and_another_adapter(
    model_type: str, peft_adapter: tuple[Path, torch.Tensor]
) -> None:
    folder, theirs = peft_adapter
    base = logits(build(model_type))
    model = build(model_type)
    adapters = plan(model_type, folder)
    adapters.put_into(model)
    assert torch.equal(logits(model), base), "B = 0: training starts at the base"
    disturb(model, TRAINED)
    trained = logits(model)
    assert (trained - base).abs().max() > 0.01
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with adapters.as_reference(model):
        assert torch.allclose(logits(model), theirs, atol=1e-6)
    with plan(model_type).as_reference(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), trained)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name for name, flag in flags.items() if flag} == {name for name in flags if f".{TRAINED}." in name}


def test_an_error_within_leaves_the_trained_adapter_on() -> None:
    model, adapters = build("llama"), plan()
    adapters.put_into(model)
    disturb(model, TRAINED)
    trained = logits(model)
    with pytest.raises(RuntimeError), adapters.as_reference(model):
        raise RuntimeError
    assert torch.equal(logits(model), trained)


def test_a_saved_adapter_is_one_for_peft(tmp_path: Path, model_type: str) -> None:
    model, adapters = build(model_type), plan(model_type, alpha=5)
    adapters.put_into(model)
    disturb(model, TRAINED)
    trained = logits(model)
    for name in ("settings", "folder"):
        (tmp_path / name).mkdir()
    adapters.trained.save_pretrained(tmp_path / "settings")
    write_adapter(adapter_weights(model.state_dict()), tmp_path / "settings", tmp_path / "folder")
    theirs = peft.PeftModel.from_pretrained(build(model_type), str(tmp_path / "folder"))
    assert torch.allclose(logits(theirs), trained, atol=1e-6)
    again = build(model_type)
    ours = plan(model_type, tmp_path / "folder")
    ours.put_into(again)
    activate(again, REFERENCE)
    assert torch.allclose(logits(again), trained, atol=1e-6)


NORMS = {
    "llama": ["input_layernorm", "norm", "post_attention_layernorm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "gpt_neox": ["final_layer_norm", "input_layernorm", "post_attention_layernorm"],
}


def scaled(model_type: str, **ia3: Any) -> nn.Module:
    """Return a model with scales that have learned something."""
    model = build(model_type)
    prepare_adapters(Ia3Config(**ia3), config_of(model_type), seed=5, base="base").put_into(model)
    torch.manual_seed(9)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def test_scales_start_at_one_and_nothing_else_is_trained(model_type: str) -> None:
    base, model = logits(build(model_type)), build(model_type)
    prepare_adapters(Ia3Config(), config_of(model_type), seed=5, base="base").put_into(model)
    assert torch.equal(logits(model), base)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    scales = {name for name in trained if name.endswith(f".ia3_l.{TRAINED}")}
    assert {name.split(".")[-2] for name in trained - scales} == set(NORMS[model_type])
    assert {name.split(".")[-3] for name in scales} == set(TARGETS[model_type])
    assert all(parameter.requires_grad is (name in trained) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("norms", [True, False])
def test_saved_scales_are_an_adapter_for_peft_which_merges_them(tmp_path: Path, model_type: str, norms: bool) -> None:
    adapters = prepare_adapters(Ia3Config(norms=norms), config_of(model_type), seed=5, base="base")
    model = scaled(model_type, norms=norms)
    for name in ("settings", "folder"):
        (tmp_path / name).mkdir()
    adapters.trained.save_pretrained(tmp_path / "settings")
    assert trained_norms(tmp_path / "settings") == (NORMS[model_type] if norms else [])
    weights = adapter_weights(model.state_dict(), norms=trained_norms(tmp_path / "settings"))
    write_adapter(weights, tmp_path / "settings", tmp_path / "folder")
    theirs = peft.PeftModel.from_pretrained(build(model_type), str(tmp_path / "folder"))
    assert (logits(model) - logits(build(model_type))).abs().max() > 0.01
    assert torch.allclose(logits(theirs), logits(model), atol=1e-5)
    assert torch.allclose(logits(theirs.merge_and_unload(safe_merge=True)), logits(model), atol=1e-5)


def test_the_first_weights_depend_on_the_seed_and_the_place_alone() -> None:
    """A stage counts its layers from its first one, and must draw what the whole model draws there."""
    whole = build("llama")
    torch.manual_seed(0)
    plan().put_into(whole)
    stage = build("llama")
    stage.model.layers = stage.model.layers[1:]
    torch.manual_seed(123)
    plan().put_into(stage, lambda name: name.replace("layers.0.", "layers.1."))
    found = {name.replace("layers.0.", "layers.1."): layer for name, layer in lora_layers(stage)}
    expected = dict(lora_layers(whole))
    assert len(found) == len(TARGETS["llama"])
    for name, layer in found.items():
        assert torch.equal(layer.lora_A[TRAINED].weight, expected[name].lora_A[TRAINED].weight), name
    weights = [layer.lora_A[TRAINED].weight.flatten()[:8].tolist() for layer in expected.values()]
    assert len({tuple(row) for row in weights}) == len(weights), "two layers start alike"
    bound = max(float(layer.lora_A[TRAINED].weight.abs().max()) for layer in expected.values())
    assert 0.5 / 48**0.5 < bound <= 1 / 32**0.5, "not peft's Kaiming-uniform bound 1 / sqrt(d)"


def test_scales_of_layers_that_the_model_does_not_have_are_named() -> None:
    with pytest.raises(ConfigError, match=r"model.ia3.targets: 'q_projj' .*did you mean 'q_proj'"):
        scaled("llama", targets=("q_projj",))


def test_targets_that_the_model_does_not_have_are_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: 'q_prj'.*did you mean 'q_proj'"):
        plan(targets=("q_prj",))
    with pytest.raises(ConfigError, match="'lm_head' is no linear layer of this model's decoder"):
        plan(targets=("lm_head",))
    model = build("llama")
    plan(targets=("v_proj",)).put_into(model)
    assert {name.rpartition(".")[2] for name, _ in lora_layers(model)} == {"v_proj"}


def test_a_reference_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reference\.adapter: .*absent is no folder of a peft adapter"):
        plan(reference=tmp_path / "absent")
    wrapped = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "good")

    def altered(name: str, **settings: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        content = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**content, **settings}))
        save_file(load_file(tmp_path / "good" / WEIGHTS_FILE), folder / WEIGHTS_FILE)
        return folder

    with pytest.raises(ConfigError, match=r"holds a .*IA3 adapter; only LoRA"):
        plan(reference=altered("ia3", peft_type="IA3", feedforward_modules=[]))
    with pytest.raises(ConfigError, match=r"changes more than linear layers \(modules_to_save\)"):
        plan(reference=altered("saves", modules_to_save=["lm_head"]))
    with pytest.raises(ConfigError, match=r"lora_A\.weight is of shape \(2, 32\).*needs \(5, 32\).*another base"):
        plan(reference=altered("rank", r=5)).put_into(build("llama"))
    with pytest.raises(ConfigError, match="which the model in training does not have"):
        plan("gpt2", reference=tmp_path / "good")
    other = tmp_path / "empty"
    other.mkdir()
    (other / "adapter_config.json").write_text((tmp_path / "good" / "adapter_config.json").read_text())
    with pytest.raises(ConfigError, match=r"has no adapter_model\.safetensors"):
        plan(reference=other)


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path: Path) -> None:
    """Also where its layers have the same names and shapes, of which one model has fewer."""
    deeper = AutoConfig.for_model("llama", **{**ARCHITECTURES["llama"], "num_hidden_layers": 3}, vocab_size=VOCABULARY)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_config(deeper), peft.LoraConfig(r=2))
    wrapped.save_pretrained(tmp_path / "deeper")
    message = r"adapts model\.layers\.2\.self_attn\.q_proj and 1 more, which the model in training does not have"
    with pytest.raises(ConfigError, match=message):
        plan(reference=tmp_path / "deeper")


def save_base(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config_of("llama")).save_pretrained(folder)
    return folder


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    """Of two models with the same shapes, by their tensors; a copy under another name is the same base."""
    base, stranger = (save_base(tmp_path / name, seed) for name, seed in (("base", 1), ("stranger", 2)))
    shutil.copytree(base, tmp_path / "copy")
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2))
    wrapped.save_pretrained(tmp_path / "adapter")
    adapters = plan(reference=tmp_path / "adapter")
    assert adapters.reference.base_model_name_or_path == str(base)
    for folder in (base, tmp_path / "copy"):
        require_same_base(adapters, folder)
    with pytest.raises(ConfigError, match=r"config\.json names the base .*/base, but the run starts from .*stranger"):
        require_same_base(adapters, stranger)
    shutil.rmtree(base)
    with pytest.raises(ConfigError, match=r"which is not there to be compared .* into base_model_name_or_path"):
        require_same_base(adapters, stranger)
    adapters.reference.base_model_name_or_path = None
    require_same_base(adapters, stranger)


def test_weights_in_four_bits_are_adapted_and_are_their_own_reference(tmp_path: Path) -> None:
    """bitsandbytes on a CPU; what a GPU would do was not run."""
    from dualtok.model.load import load_causal_lm

    torch.manual_seed(0)
    settings = {**ARCHITECTURES["llama"], "hidden_size": 64, "intermediate_size": 128, "vocab_size": VOCABULARY}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).save_pretrained(tmp_path)
    exact, model = load_causal_lm(tmp_path), load_causal_lm(tmp_path, quantize="nf4")
    base = logits(model)
    assert 0 < (base - logits(exact)).abs().mean() < 0.2 * logits(exact).abs().mean()
    adapters = prepare_adapters(LoraConfig(rank=2), AutoConfig.from_pretrained(tmp_path), seed=0, base=str(tmp_path))
    adapters.put_into(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(40)[None] % VOCABULARY
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    with adapters.as_reference(model):
        assert torch.equal(logits(model), base)
