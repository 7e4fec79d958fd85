"""The method written a second time, from its formulas and without torch, and ranks that need no processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from dualtok.objective import WeightedLoss
    from dualtok.objective.selection import Gather


@dataclass
class Expected:
    """What the formulas give: float64 value, gradient with respect to each token loss, and the two sets."""

    loss: float
    gradient: NDArray[np.float64]
    hard: NDArray[np.bool_]
    memorized: NDArray[np.bool_]


def expected_dual(
    token_loss: NDArray[np.floating[Any]],
    reference_loss: NDArray[np.floating[Any]],
    mask: NDArray[np.bool_],
    *,
    hard_share: float = 0.6,
    memorized_share: float = 0.2,
    tau: float = 0.0,
    alpha: float = 0.8,
    normalize: str = "per_set",
) -> Expected:
    """Return L = mean CE over T_h - alpha * mean CE over T_m, one token at a time in plain Python."""
    losses = token_loss.ravel().astype(np.float64)
    tokens = [int(i) for i in np.flatnonzero(mask)]
    n = len(tokens)
    # The score is defined in float32: in float64 two tokens might be told apart that tie in float32.
    s = {i: float(np.float32(token_loss.ravel()[i]) - np.float32(reference_loss.ravel()[i])) for i in tokens}

    n_hard = math.floor(hard_share * n + 1e-9)
    if n > 0 and hard_share > 0 and n_hard == 0:
        n_hard = 1
    hard = sorted(tokens, key=lambda i: (-s[i], i))[:n_hard]
    others = [i for i in tokens if i not in set(hard)]
    lowest = sorted(others, key=lambda i: (s[i], i))[: math.floor(memorized_share * n + 1e-9)]
    memorized = [i for i in lowest if s[i] < tau]

    gradient = np.zeros(losses.shape)
    gradient[hard] += 1.0 / max(len(hard), 1)
    divisor = len(memorized) if normalize == "per_set" else memorized_share * n
    if memorized:
        gradient[memorized] -= alpha / divisor
    chosen = [*hard, *memorized]
    return Expected(
        float(np.sum(gradient[chosen] * losses[chosen])),
        gradient.reshape(mask.shape),
        _members(hard, mask.shape),
        _members(memorized, mask.shape),
    )


def _members(indices: list[int], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    members = np.zeros(shape, dtype=bool)
    members.ravel()[indices] = True
    return members


def on_ranks(world_size: int, compute: Callable[[int, Gather], Any]) -> list[Any]:
    """Run ``compute(rank, gather)`` for every rank and return the results in rank order.

    A first pass records what each rank would send, a second one answers with everyone's values. What a rank sends must
    not depend on what it received; that, and that all ranks communicate equally often, is checked.
    """
    sent: list[list[torch.Tensor]] = []
    for rank in range(world_size):
        calls: list[torch.Tensor] = []

        def record(values: torch.Tensor, calls: list[torch.Tensor] = calls) -> tuple[torch.Tensor, int]:
            assert values.ndim == 1
            assert values.dtype == torch.float32
            assert not values.requires_grad
            calls.append(values.clone())
            return values, 0

        compute(rank, record)
        sent.append(calls)
    assert len({len(calls) for calls in sent}) == 1, "ranks call gather a different number of times: they would hang"

    results = []
    for rank in range(world_size):
        turn = iter(range(len(sent[rank])))

        def answer(values: torch.Tensor, rank: int = rank, turn: Any = turn) -> tuple[torch.Tensor, int]:
            call = next(turn)
            torch.testing.assert_close(values, sent[rank][call], rtol=0, atol=0)
            offset = sum(len(calls[call]) for calls in sent[:rank])
            return torch.cat([calls[call] for calls in sent]), offset

        results.append(compute(rank, answer))
        assert next(turn, None) is None
    return results


def backward(outcome: WeightedLoss, leaf: torch.Tensor) -> torch.Tensor:
    """Return the gradient of an outcome's loss with respect to ``leaf``; fails if they are not connected."""
    (gradient,) = torch.autograd.grad(outcome.loss, leaf)
    return gradient


def random_losses(seed: int, shape: tuple[int, ...], *, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token losses (a leaf that takes gradients) and reference losses; with ``ties`` on a coarse grid."""
    generator = torch.Generator().manual_seed(seed)
    token_loss = torch.rand(shape, generator=generator) * 6
    reference_loss = (token_loss + torch.randn(shape, generator=generator)).clamp(min=0)
    if ties:
        token_loss, reference_loss = token_loss.round(), reference_loss.round()
    return token_loss.requires_grad_(), reference_loss


def random_mask(seed: int, shape: tuple[int, ...], share: float = 0.7) -> torch.Tensor:
    """Return a mask that is True for about ``share`` of the positions."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(1000 + seed)) < share
