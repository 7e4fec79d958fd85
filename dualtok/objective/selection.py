"""Which tokens are learned (hard) and which are unlearned (memorised).

Legend: n = predicted tokens in the scope, over all ranks when a ``gather`` is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch

Gather = Callable[[torch.Tensor], tuple[torch.Tensor, int]]
"""This rank's 1-D float32 values -> (all ranks' values concatenated in rank order, this rank's offset in them). It may carry
an attribute ``world_size``, which saves the collective that would otherwise count the ranks."""

ROUNDING = 1e-9
"""Added before the floor of share * n, so that 0.6 * 5 = 2.9999999999999996 selects 3 tokens."""


@dataclass(frozen=True)
class SelectionConfig:
    """Shares, threshold and weight of the dual loss."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    hard_share: float = 0.6
    """K_h, share of all predicted tokens that are learned: those with the highest s(t). Default: paper."""

    memorised_share: float = 0.2
    """K_m, largest share of all predicted tokens that are unlearned: those with the lowest s(t). Default: paper."""

    tau: float = 0.0
    """Only tokens with s(t) below this, in nats, are unlearned. Default: paper."""

    alpha: float = 0.8
    """Weight of the unlearning term. Default: paper, which reports divergence at 1.5-2."""

    normalize: Literal["per_set", "per_share"] = "per_set"
    """``per_set``: the mean over T_m. ``per_share``: its sum over K_m * n, so that a nearly empty T_m stays harmless. The paper
    does not say; ``per_set`` is the reading used here."""

    scope: Literal["micro_batch", "local"] = "micro_batch"
    """Tokens that are ranked together: one micro-batch over all data-parallel ranks, or this rank's part of it alone."""

    def __post_init__(self) -> None:
        """Refuse shares and weights that mean nothing."""
        check_shares(self.hard_share, self.memorised_share)
        if not math.isfinite(self.tau):
            raise ValueError(f"selection.tau: must be finite, got {self.tau}")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"selection.alpha: must be finite and not negative, got {self.alpha}")


class SelectionCounts(NamedTuple):
    """Sizes of the sets over the whole scope, all ranks included."""

    tokens: int
    hard: int
    memorised: int


class Selection(NamedTuple):
    """The two disjoint sets, as masks of this rank's scores."""

    hard: torch.Tensor
    memorised: torch.Tensor
    counts: SelectionCounts


def check_shares(hard_share: float, memorised_share: float) -> None:
    """Raise ValueError for shares outside [0, 1] or summing above 1."""
    for name, share in (("hard_share", hard_share), ("memorised_share", memorised_share)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"selection.{name}: must lie between 0 and 1, got {share}")
    if hard_share + memorised_share > 1.0 + ROUNDING:
        raise ValueError(
            f"selection.hard_share + selection.memorised_share: {hard_share} + {memorised_share} is above 1; "
            "a token cannot be learned and unlearned at once"
        )


def select_tokens(
    scores: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    hard_share: float = 0.6,
    memorised_share: float = 0.2,
    tau: float = 0.0,
    gather: Gather | None = None,
) -> Selection:
    """Choose T_h, the highest scores, and T_m, the lowest below ``tau`` among the rest.

    |T_h| = floor(hard_share * n), at least 1 when n and hard_share are positive. |T_m| <= floor(memorised_share * n). Equal
    scores are taken in the order of their (global) position. A NaN counts as the highest score: it is learned, so that it shows
    in the loss, and never unlearned.

    Args:
        scores: s(t), any shape.
        mask: same shape, True for real, predicted tokens; None takes all.
        hard_share: K_h.
        memorised_share: K_m.
        tau: upper bound (excluded) of the scores in T_m, nats.
        gather: collects the scores of all ranks; None ranks these alone.

    Returns:
        Masks of the shape of ``scores`` and the global counts.

    Raises:
        ValueError: the shapes differ, or the shares sum above 1.
    """
    check_shares(hard_share, memorised_share)
    mask = _full_mask(scores, mask)
    own = torch.nan_to_num(scores.detach()[mask].float(), nan=math.inf, posinf=math.inf, neginf=-math.inf)
    everyone, offset = (own, 0) if gather is None else gather(own)
    n = len(everyone)
    n_hard = set_size(hard_share, n)
    if n and hard_share > 0:
        n_hard = max(n_hard, 1)
    n_memorised = min(set_size(memorised_share, n), n - n_hard)

    order = torch.sort(everyone, descending=True, stable=True).indices
    hard = torch.zeros(n, dtype=torch.bool, device=everyone.device)
    hard[order[:n_hard]] = True
    memorised = torch.zeros_like(hard)
    # T_h is out of the running before T_m is drawn: with ties at the border the two could overlap otherwise.
    rest = (~hard).nonzero().squeeze(1)
    lowest = rest[torch.sort(everyone[rest], stable=True).indices[:n_memorised]]
    memorised[lowest] = everyone[lowest] < tau

    here = slice(offset, offset + len(own))
    return Selection(
        _scatter(hard[here], mask),
        _scatter(memorised[here], mask),
        SelectionCounts(n, n_hard, int(memorised.sum())),
    )


def set_size(share: float, n: int) -> int:
    """Return floor(share * n) in exact terms (:data:`ROUNDING`)."""
    return math.floor(share * n + ROUNDING)


def _full_mask(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return torch.ones_like(values, dtype=torch.bool)
    if mask.shape != values.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, the losses {tuple(values.shape)}; they must agree")
    return mask.bool()


def _scatter(selected: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    result = torch.zeros_like(mask)
    result[mask] = selected
    return result
