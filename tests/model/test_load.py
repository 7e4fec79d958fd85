"""What is loaded is what was asked for, and what cannot be trained on is refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from dualtok.config.model import ModelConfig
from dualtok.errors import ConfigError
from dualtok.model.empty import empty_causal_lm
from dualtok.model.fresh import meta_model
from dualtok.model.load import load_causal_lm, read_model_config, starting_config
from tests.support import VOCABULARY, save_model, tiny_llama_config

if TYPE_CHECKING:
    from pathlib import Path


def test_the_vocabulary_is_the_tokenizers_unless_given() -> None:
    assert starting_config(ModelConfig(config=tiny_llama_config()), 777).vocab_size == 777
    assert starting_config(ModelConfig(config=tiny_llama_config(vocab_size=1000)), 777).vocab_size == 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 8}, "no setting 'hiden_size' (did you mean 'hidden_size'?)"),
        ({"model_type": "lama"}, "no model_type 'lama' (did you mean 'llama'?)"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 0}, "modulo by zero"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        starting_config(ModelConfig(config=tiny_llama_config(**changes)), VOCABULARY)
    assert message in str(caught.value)


def test_an_activation_that_nobody_knows_is_named() -> None:
    config = starting_config(ModelConfig(config=tiny_llama_config(hidden_act="sillu")), VOCABULARY)
    for build in (empty_causal_lm, meta_model):
        with pytest.raises(ConfigError, match=r"model\.config: no model can be built: no 'sillu' is known"):
            build(config)


def test_folders_without_a_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"no weights \(model\.safetensors or"):
        load_causal_lm(tmp_path)


def test_an_architecture_without_positions_is_refused(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="takes no position_ids"):
        load_causal_lm(tmp_path, attention="eager")


def test_activation_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", seed=3)
    ids = torch.arange(32)[None] % VOCABULARY
    gradients = []
    for checkpointing in (False, True):
        model = load_causal_lm(folder, activation_checkpointing=checkpointing).train()
        assert model.is_activation_checkpointing == checkpointing
        model(input_ids=ids, position_ids=torch.arange(32)[None], labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-6, atol=1e-7)
