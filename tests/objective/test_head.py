from __future__ import annotations

import pytest
import torch
from torch import nn

from dualtok.objective import LogitScaling, LossHead, dual_loss, token_losses
from dualtok.objective.head import chunked_token_losses

B, T, D, V = 3, 10, 8, 17
SOFT_CAP = LogitScaling(softcap=2.0)


class CountingHead(nn.Linear):
    """No plain linear layer. Counts its calls and keeps the number of rows that it was given."""

    def __init__(self) -> None:
        super().__init__(D, V, bias=False)
        self.rows: list[int] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.rows.append(hidden.shape[0])
        return super().forward(hidden)


@pytest.fixture
def head() -> CountingHead:
    torch.manual_seed(0)
    return CountingHead()


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.fixture
def labels() -> torch.Tensor:
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(2))
    labels[0, 3:6] = labels[:, -1] = -100
    return labels


def expected_losses(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = hidden.detach().double() @ weight.detach().double().T
    losses = -(logits - logits.logsumexp(-1, keepdim=True)).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels == -100, 0.0, losses)


@pytest.mark.parametrize("bias", [False, True])
def test_a_loss_head_takes_over_the_parameters_themselves(hidden: torch.Tensor, bias: bool) -> None:
    layer = nn.Linear(D, V, bias=bias)
    layer.weight.requires_grad_(requires_grad=False)
    replaced = LossHead(layer)
    assert replaced.weight is layer.weight
    assert replaced.bias is layer.bias
    assert list(replaced.state_dict()) == list(layer.state_dict())
    torch.testing.assert_close(replaced(hidden), layer(hidden), rtol=0, atol=0)
    assert not LossHead(layer.eval()).training


def test_a_loss_head_gives_the_negative_log_probability_of_the_label(
    hidden: torch.Tensor, labels: torch.Tensor
) -> None:
    layer = nn.Linear(D, V, bias=False)
    losses = LossHead(layer)(hidden, labels)
    assert losses.shape == (B, T)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses.detach().double(), expected_losses(hidden, layer.weight, labels), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(token_losses(hidden, labels, LossHead(layer), vocabulary=V), losses)


@pytest.mark.parametrize("scaling", [LogitScaling(), SOFT_CAP, LogitScaling(0.3)])
def test_a_loss_head_and_any_other_layer_agree(
    head: CountingHead, hidden: torch.Tensor, labels: torch.Tensor, scaling: LogitScaling
) -> None:
    results = []
    weights = torch.randn(B, T, generator=torch.Generator().manual_seed(3))
    for layer in (LossHead(head, scaling=scaling), head):
        losses = token_losses(hidden * 4, labels, layer, vocabulary=V, scaling=scaling, memory_mib=1e-3)
        results.append((losses, *torch.autograd.grad((losses * weights).sum(), (hidden, head.weight))))
    assert head.rows[0] < B * T, "the other layer was not called chunk by chunk"
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_only_a_plain_linear_layer_is_replaced() -> None:
    assert LossHead.can_replace(nn.Linear(2, 3))
    assert LossHead.can_replace(LossHead(nn.Linear(2, 3)))
    assert not LossHead.can_replace(CountingHead())
    assert not LossHead.can_replace(nn.Sequential(nn.Linear(2, 3)))


def test_a_tied_weight_gets_the_gradient_of_both_uses(labels: torch.Tensor) -> None:
    """Embedding and lm_head share one weight, and the loss is the dual loss: the case that tiled kernels got wrong."""
    torch.manual_seed(0)
    embedding, tied = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
    tied.weight = embedding.weight
    ids = torch.randint(0, V, (B, T))
    reference_loss = torch.rand(B, T) * 5
    gradients = []
    for losses_of in (
        LossHead(tied),
        lambda hidden, labels: chunked_token_losses(hidden, labels, tied, chunk_tokens=4),
        lambda hidden, labels: nn.functional.cross_entropy(tied(hidden).mT, labels, reduction="none"),
    ):
        outcome = dual_loss(losses_of(embedding(ids).tanh(), labels), reference_loss, labels != -100)
        gradients.append(torch.autograd.grad(outcome.loss, embedding.weight)[0])
    assert outcome.weights.memorized.any()
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 7, 29, 30, 1000])
@pytest.mark.parametrize("scaling", [LogitScaling(), SOFT_CAP])
def test_chunks_change_neither_values_nor_gradients(
    head: CountingHead, hidden: torch.Tensor, labels: torch.Tensor, chunk: int, scaling: LogitScaling
) -> None:
    # Weights of both signs, as the dual loss has them.
    weights = torch.randn(B, T, generator=torch.Generator().manual_seed(3))
    results = []
    for size in (B * T, chunk):
        losses = chunked_token_losses(hidden, labels, head, chunk_tokens=size, scaling=scaling)
        results.append((losses, *torch.autograd.grad((losses * weights).sum(), (hidden, head.weight))))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)
    if scaling == LogitScaling():
        torch.testing.assert_close(
            losses.detach().double(), expected_losses(hidden, head.weight, labels), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(("chunk", "calls"), [(1000, 1), (30, 1), (29, 2), (7, 5), (1, 30)])
def test_no_more_than_a_chunk_of_logits_exists_at_once(
    head: CountingHead, hidden: torch.Tensor, labels: torch.Tensor, chunk: int, calls: int
) -> None:
    saved_logits = []

    def watch(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 2 and tensor.shape[1] == V and tensor is not head.weight:
            saved_logits.append(tensor.shape[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
        losses = chunked_token_losses(hidden, labels, head, chunk_tokens=chunk)
    assert len(head.rows) == calls
    assert max(head.rows) == min(chunk, B * T)
    assert sum(head.rows) == B * T
    if calls > 1:
        assert not saved_logits, "the forward pass keeps logits for the backward pass"
    losses.sum().backward()
    assert len(head.rows[calls:]) == (calls if calls > 1 else 0)


@pytest.mark.parametrize("fill", [-100, 3])
def test_the_number_of_calls_does_not_depend_on_the_labels(
    head: CountingHead, hidden: torch.Tensor, labels: torch.Tensor, fill: int
) -> None:
    """Under ZeRO-3 a rank that called lm_head less often than the others would make them wait for ever."""
    losses = chunked_token_losses(hidden, torch.full_like(labels, fill), head, chunk_tokens=4)
    losses.sum().backward()
    assert head.rows == [4] * 7 + [2] + ([2] + [4] * 7)
    assert losses.any() == (fill >= 0)
    assert head.weight.grad is not None
    assert head.weight.grad.any() == (fill >= 0)


def test_low_precision_logits_are_reduced_in_float32() -> None:
    torch.manual_seed(0)
    lm_head = nn.Linear(D, 4096, bias=False).bfloat16()
    hidden = torch.randn(1, 6, D, dtype=torch.bfloat16)
    labels = torch.arange(6)[None]
    logits = lm_head(hidden).detach().double()[0]
    expected = logits.logsumexp(-1) - logits[torch.arange(6), labels[0]]
    for losses in (chunked_token_losses(hidden, labels, lm_head, chunk_tokens=2), LossHead(lm_head)(hidden, labels)):
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses[0].detach().double(), expected, rtol=1e-5, atol=1e-5)


def test_both_work_without_gradients_and_without_tokens(head: CountingHead, hidden: torch.Tensor) -> None:
    labels = torch.zeros(B, T, dtype=torch.int64)
    for layer in (head, LossHead(head)):
        with torch.no_grad():
            losses = token_losses(hidden, labels, layer, vocabulary=V)
        assert not losses.requires_grad
        torch.testing.assert_close(losses, token_losses(hidden, labels, layer, vocabulary=V).detach())
        assert token_losses(hidden[:0], labels[:0], layer, vocabulary=V).shape == (0, T)


def test_wrong_arguments_are_refused(head: CountingHead, hidden: torch.Tensor, labels: torch.Tensor) -> None:
    for layer in (head, LossHead(head)):
        with pytest.raises(ValueError, match=r"\(3, 10, 8\).*\(3, 9\)"):
            token_losses(hidden, labels[:, 1:], layer, vocabulary=V)
    with pytest.raises(ValueError, match="chunk_tokens"):
        chunked_token_losses(hidden, labels, head, chunk_tokens=0)
