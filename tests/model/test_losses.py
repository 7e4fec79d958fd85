"""Token losses: the same packed and unpacked, the same as transformers' own, and refused where they would not be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dualtok.data.packing import model_inputs, pack_documents
from dualtok.errors import ConfigError
from dualtok.model.losses import SignalModel, TokenLossModel, check_batch, require_faithful
from dualtok.objective import LossHead
from dualtok.objective.chunked_cross_entropy import linear_cross_entropy

VOCABULARY, BLOCK_LENGTH = 97, 48
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}
LENGTHS = (5, 48, 31, 2, 17, 120, 1, 9, 48, 30)


def build(model_type: str, attention: str = "sdpa", **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {**ARCHITECTURES.get(model_type, ARCHITECTURES["llama"]), "vocab_size": VOCABULARY, **changes}
    config = AutoConfig.for_model(model_type, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def documents() -> list[tuple[int, np.ndarray]]:
    generator = np.random.default_rng(1)
    return [(doc, generator.integers(0, VOCABULARY, size).astype(np.int32)) for doc, size in enumerate(LENGTHS)]


def losses_alone(model: torch.nn.Module, ids: np.ndarray) -> list[np.ndarray]:
    """Return a document's losses, piece by piece, from the unwrapped model with nothing else in the row."""
    pieces = []
    for start in range(0, len(ids), BLOCK_LENGTH):
        piece = torch.from_numpy(ids[start : start + BLOCK_LENGTH].astype(np.int64))[None]
        logits = model(input_ids=piece).logits[0, :-1]
        pieces.append(torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="none").numpy())
    return pieces


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@torch.no_grad()
def test_packed_documents_have_the_losses_they_have_alone(model_type: str, attention: str) -> None:
    model = build(model_type, attention)
    blocks = pack_documents(documents(), BLOCK_LENGTH)
    assert len(blocks) < len(LENGTHS), "nothing was packed together"
    lengths = [np.array([piece.length for piece in block.segments]) for block in blocks]
    batch = model_inputs(np.stack([block.input_ids for block in blocks]), lengths)
    packed = TokenLossModel(model)(batch).numpy()
    alone = {doc: losses_alone(model, ids) for doc, ids in documents()}
    compared = 0
    for row, block in enumerate(blocks):
        column = 0
        for piece in block.segments:
            expected = alone[piece.doc][piece.start // BLOCK_LENGTH]
            found = packed[row, column : column + piece.length - 1]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
            assert packed[row, column + piece.length - 1] == 0.0, "a loss across a document boundary"
            compared += len(expected)
            column += piece.length
    assert compared == sum(LENGTHS) - sum(-(-length // BLOCK_LENGTH) for length in LENGTHS)


@torch.no_grad()
def test_a_neighbor_does_not_show() -> None:
    """Fails when attention reaches over a document boundary, even if each loss stays plausible."""
    model = TokenLossModel(build("llama"))
    ids = np.random.default_rng(2).integers(0, VOCABULARY, (1, BLOCK_LENGTH)).astype(np.int32)
    other = ids.copy()
    other[:, :20] = (other[:, :20] + 1) % VOCABULARY
    lengths = [np.array([20, 28])]
    first, second = (model(model_inputs(tokens, lengths)) for tokens in (ids, other))
    torch.testing.assert_close(first[:, 20:], second[:, 20:], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(first[:, :20], second[:, :20])
    undivided = model(model_inputs(other, [np.array([48])]))
    assert not torch.allclose(undivided[:, 20:], second[:, 20:], atol=1e-3), "the test cannot see a leak"


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
@torch.no_grad()
def test_the_head_is_transformers_own(model_type: str, changes: dict[str, Any]) -> None:
    model = TokenLossModel(build(model_type, attention="eager", **changes))
    batch = model_inputs(
        np.random.default_rng(3).integers(0, VOCABULARY, (2, 32)).astype(np.int32), [np.array([32])] * 2
    )
    require_faithful(model(check_batch(batch), check=True), "fp32", model_type)


@torch.no_grad()
def test_logits_changed_in_an_unknown_way_are_refused() -> None:
    causal_lm = build("cohere", logit_scale=0.25)
    model = TokenLossModel(causal_lm)
    causal_lm.logit_scale = 0.5  # as for an architecture whose scale dualtok does not know
    batch = model_inputs(np.random.default_rng(3).integers(0, VOCABULARY, (1, 32)).astype(np.int32), [np.array([32])])
    with pytest.raises(ConfigError, match="changes its logits"):
        require_faithful(model.errors(check_batch(batch)), "fp32", "cohere")
    with pytest.raises(ConfigError):
        require_faithful(torch.tensor([float("nan"), 0.0]), "fp32", "broken")


@torch.no_grad()
def test_an_architecture_that_looks_across_documents_is_refused() -> None:
    """OPT takes position_ids, for its embeddings alone: its mask lets every document see the one before."""
    model = TokenLossModel(build("opt", hidden_size=32, ffn_dim=48, word_embed_proj_dim=32))
    batch = model_inputs(np.random.default_rng(3).integers(0, VOCABULARY, (1, 48)).astype(np.int32), [np.array([48])])
    with pytest.raises(ConfigError, match="with the document packed before it"):
        require_faithful(model.errors(check_batch(batch)), "fp32", "OPT")


@torch.no_grad()
def test_a_batch_laid_in_one_row_has_the_same_losses() -> None:
    """What flash attention needs; the row layout is tried here with sdpa, for there is no GPU."""
    model = TokenLossModel(build("llama"))
    lengths = [np.array([20, 28]), np.array([48]), np.array([7, 9, 30])]
    batch = model_inputs(np.random.default_rng(5).integers(0, VOCABULARY, (3, 48)).astype(np.int32), lengths)
    expected = model(batch)
    model._one_row = True
    torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_the_output_layer_is_replaced_under_its_own_name(model_type: str, tie: bool) -> None:
    causal_lm = build(model_type, tie_word_embeddings=tie)
    names, values = zip(*causal_lm.state_dict().items(), strict=True)
    weight, attribute = causal_lm.get_output_embeddings().weight, type(causal_lm.get_output_embeddings())
    assert attribute is torch.nn.Linear
    model = TokenLossModel(causal_lm)
    head = causal_lm.get_output_embeddings()
    assert isinstance(head, LossHead)
    assert head.weight is weight
    assert (head.weight is causal_lm.get_input_embeddings().weight) == tie
    assert tuple(causal_lm.state_dict()) == names
    for now, before in zip(causal_lm.state_dict().values(), values, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0)
    assert isinstance(TokenLossModel(model.causal_lm, memory_mib=8.0).causal_lm.get_output_embeddings(), LossHead)


class Wrapped(torch.nn.Module):
    """An output layer as an adapter makes it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) + 0.1 * hidden.sum(-1, keepdim=True)


def test_an_output_layer_that_is_not_plain_is_called_as_it_is() -> None:
    causal_lm = build("llama")
    causal_lm.set_output_embeddings(Wrapped(causal_lm.get_output_embeddings()))
    batch = model_inputs(
        np.random.default_rng(3).integers(0, VOCABULARY, (2, 32)).astype(np.int32), [np.array([32])] * 2
    )
    losses = [TokenLossModel(causal_lm, memory_mib=memory)(batch) for memory in (None, 0.005)]
    assert isinstance(causal_lm.get_output_embeddings(), Wrapped)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        require_faithful(TokenLossModel(causal_lm).errors(check_batch(batch)), "fp32", "wrapped")
    with pytest.raises(ConfigError, match=r"loss_backend.*Wrapped.*use loss_backend: torch"):
        TokenLossModel(causal_lm, kernel=linear_cross_entropy)


@torch.no_grad()
def test_signals_see_the_logits_of_every_row() -> None:
    causal_lm = build("llama")
    batch = model_inputs(
        np.random.default_rng(4).integers(0, VOCABULARY, (3, 16)).astype(np.int32), [np.array([16])] * 3
    )
    model = SignalModel(causal_lm, lambda logits, labels: {"top": logits.argmax(-1), "label": labels})
    signals = model(batch)
    logits = causal_lm(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    torch.testing.assert_close(signals["top"], logits.argmax(-1))
    torch.testing.assert_close(signals["label"], batch["labels"])
