"""Operations per token against those that torch counts in real passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from dualtok.plan.flops import flops_per_token
from dualtok.plan.shape import read_shape

BLOCKS, LENGTH = 2, 64
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "vocab_size": 256}


@pytest.mark.parametrize(
    "settings", [{**LLAMA, "tie_word_embeddings": True}, {**LLAMA, "tie_word_embeddings": False}, GPT2]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_it_is_what_torch_counts(settings: dict[str, Any], frozen: bool) -> None:
    values = dict(settings)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if frozen:  # as below adapters: the first layer's input has a gradient, the weights have none
        model.requires_grad_(False)
        model.enable_input_require_grads()
    ids = torch.randint(256, (BLOCKS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    counted = counter.get_total_flops() / ids.numel()
    assert flops_per_token(read_shape(config), LENGTH, frozen=frozen) == pytest.approx(counted, rel=0.02)
