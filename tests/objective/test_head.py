from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dualtok.objective import dual_loss, token_losses, torch_cross_entropy

B, T, D, V = 3, 10, 8, 17


class CountingHead(nn.Linear):
    """Counts its calls and keeps the largest number of rows that it was given at once."""

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


def soft_cap(logits: torch.Tensor) -> torch.Tensor:
    return 2.0 * torch.tanh(logits / 2.0)


def test_it_is_the_negative_log_probability_of_the_label(
    head: CountingHead, hidden: torch.Tensor, labels: torch.Tensor
) -> None:
    losses = token_losses(hidden, labels, head, chunk_tokens=7)
    logits = hidden.detach().double() @ head.weight.detach().double().T
    expected = -(logits - logits.logsumexp(-1, keepdim=True)).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    assert losses.shape == (B, T)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses.detach().double(), torch.where(labels == -100, 0.0, expected), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("chunk", [1, 4, 7, 29, 30, 1000])
@pytest.mark.parametrize("transform", [None, soft_cap])
def test_chunks_change_neither_values_nor_gradients(
    head: CountingHead, hidden: torch.Tensor, labels: torch.Tensor, chunk: int, transform: Any
) -> None:
    # Weights of both signs, as the dual loss has them.
    weights = torch.randn(B, T, generator=torch.Generator().manual_seed(3))
    results = []
    for size in (None, chunk):
        losses = token_losses(hidden, labels, head, chunk_tokens=size, transform=transform)
        results.append((losses, *torch.autograd.grad((losses * weights).sum(), (hidden, head.weight))))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


def test_the_transform_is_applied(head: CountingHead, hidden: torch.Tensor, labels: torch.Tensor) -> None:
    capped = token_losses(hidden * 10, labels, head, chunk_tokens=4, transform=soft_cap)
    expected = torch_cross_entropy(soft_cap(head(hidden * 10)).flatten(0, 1), labels.flatten()).view(B, T)
    torch.testing.assert_close(capped, expected)
    assert not torch.allclose(capped, token_losses(hidden * 10, labels, head))


def test_a_tied_weight_gets_the_gradient_of_both_uses(labels: torch.Tensor) -> None:
    """Embedding and lm_head share one weight, and the loss is the dual loss: the case that tiled kernels got wrong."""
    torch.manual_seed(0)
    embedding, tied = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
    tied.weight = embedding.weight
    ids = torch.randint(0, V, (B, T))
    reference_loss = torch.rand(B, T) * 5
    gradients = []
    for chunk in (None, 4):
        token_loss = token_losses(embedding(ids).tanh(), labels, tied, chunk_tokens=chunk)
        outcome = dual_loss(token_loss, reference_loss, labels != -100)
        gradients.append(torch.autograd.grad(outcome.loss, embedding.weight)[0])
    assert outcome.memorised.any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("chunk", "calls"), [(None, 1), (30, 1), (29, 2), (7, 5), (1, 30)])
def test_no_more_than_a_chunk_of_logits_exists_at_once(
    head: CountingHead, hidden: torch.Tensor, labels: torch.Tensor, chunk: int | None, calls: int
) -> None:
    live: list[int] = []
    saved_logits = []

    def watch(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 2 and tensor.shape[1] == V and tensor is not head.weight:
            saved_logits.append(tensor.shape[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
        losses = token_losses(hidden, labels, head, chunk_tokens=chunk)
    live.extend(head.rows)
    assert len(live) == calls
    assert max(live) == min(chunk or B * T, B * T)
    assert sum(live) == B * T
    if calls > 1:
        assert not saved_logits, "the forward pass keeps logits for the backward pass"
    losses.sum().backward()
    again = head.rows[calls:]
    assert len(again) == (calls if calls > 1 else 0)


@pytest.mark.parametrize("fill", [-100, 3])
def test_the_number_of_calls_does_not_depend_on_the_labels(
    head: CountingHead, hidden: torch.Tensor, labels: torch.Tensor, fill: int
) -> None:
    """Under ZeRO-3 a rank that called lm_head less often than the others would make them wait for ever."""
    losses = token_losses(hidden, torch.full_like(labels, fill), head, chunk_tokens=4)
    losses.sum().backward()
    assert head.rows == [4] * 7 + [2] + ([2] + [4] * 7)
    assert losses.any() == (fill >= 0)
    assert head.weight.grad is not None
    assert head.weight.grad.any() == (fill >= 0)


def test_positions_without_a_label_are_zero_whatever_the_kernel_says(
    head: CountingHead, hidden: torch.Tensor, labels: torch.Tensor
) -> None:
    def careless(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = torch_cross_entropy(logits, targets.clamp(min=0)).to(torch.bfloat16)
        return torch.where(targets == -100, float("nan"), loss)

    losses = token_losses(hidden, labels, head, chunk_tokens=4, cross_entropy=careless)
    assert losses.dtype == torch.float32
    assert not losses[labels == -100].any()
    assert losses[labels != -100].all()
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    assert torch.isfinite(gradient).all()
    assert not gradient[labels == -100].any()


def test_low_precision_logits_are_reduced_in_float32() -> None:
    torch.manual_seed(0)
    lm_head = nn.Linear(D, 4096, bias=False).bfloat16()
    hidden = torch.randn(1, 6, D, dtype=torch.bfloat16)
    labels = torch.arange(6)[None]
    losses = token_losses(hidden, labels, lm_head, chunk_tokens=2)
    logits = lm_head(hidden).detach().double()[0]
    expected = logits.logsumexp(-1) - logits[torch.arange(6), labels[0]]
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses[0].detach().double(), expected, rtol=1e-5, atol=1e-5)


def test_it_works_without_gradients_and_without_tokens(head: CountingHead, hidden: torch.Tensor) -> None:
    labels = torch.zeros(B, T, dtype=torch.int64)
    with torch.no_grad():
        losses = token_losses(hidden, labels, head, chunk_tokens=4)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, token_losses(hidden, labels, head).detach())
    assert token_losses(hidden[:0], labels[:0], head, chunk_tokens=4).shape == (0, T)


def test_wrong_arguments_are_refused(head: CountingHead, hidden: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(3, 10, 8\).*\(3, 9\)"):
        token_losses(hidden, labels[:, 1:], head)
    with pytest.raises(ValueError, match="chunk_tokens"):
        token_losses(hidden, labels, head, chunk_tokens=0)
