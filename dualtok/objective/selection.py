"""Which tokens are learned (hard) and which are unlearned (memorized).

Legend: n = tokens that are ranked, over all ranks when a ``gather`` is given; m = those of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dualtok.objective.settings import ROUNDING, SelectionConfig

Gather = Callable[[torch.Tensor], tuple[torch.Tensor, int]]
"""This rank's 1-D float32 values -> (all ranks' values concatenated in rank order, this rank's offset in them).
Ranks may hold different numbers of values, some none. One with an attribute ``world_size``, as :class:`RankGather`
has, need not be called to learn it."""


class SelectionCounts(NamedTuple):
    """Sizes over the whole scope, all ranks included."""

    tokens: int
    """n, all tokens that were ranked."""
    hard: int
    memorized: int


@dataclass(frozen=True)
class RankGather:
    """A gather that knows the number of ranks, which saves a collective per micro-batch."""

    collect: Gather
    world_size: int

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return what ``collect`` returns."""
        return self.collect(values)


class Selection(NamedTuple):
    """The two disjoint sets, as masks of this rank's tokens, and their global sizes."""

    hard: torch.Tensor
    memorized: torch.Tensor
    counts: SelectionCounts


def select_tokens(
    calibrated: torch.Tensor,
    mask: torch.Tensor | None = None,
    selection: SelectionConfig = SelectionConfig(),  # noqa: B008 - it is frozen
    *,
    gather: Gather | None = None,
) -> Selection:
    """Choose T_h, the tokens of highest s(t), and T_m, those of lowest s(t) below ``tau`` (DuoLearn, arXiv 2502.19726).

    * |T_h| = floor(hard_share * n), at least 1 when n and ``hard_share`` are positive.
    * |T_m| <= floor(memorized_share * n); only tokens with s(t) strictly below ``tau``. A share of 0 is an empty set.
    * The sets never overlap: T_m is drawn from what T_h leaves (a lone token is learned, not unlearned).
    * Equal values are taken in the order of their global position, the lower one first, in both sets.
    * Infinities rank as what they are. A NaN cannot be ranked: it is left out as if it were masked, so it is neither
      learned nor unlearned nor counted in n. Where the reference is broken a token must not be trained on without its
      defence.

    Sorting makes it O(n log n). The host waits for the device where the number of ranked tokens must be known, and once
    for the size of T_m.

    Args:
        calibrated: s(t), any shape, any float dtype; ranked in float32.
        mask: bool, same shape, True for real, predicted tokens; None takes all. What stands in masked positions is
            ignored.
        selection: its ``hard_share``, ``memorized_share`` and ``tau`` count here.
        gather: collects s(t) of all ranks; None ranks these tokens alone. Every rank must call this function equally
            often.

    Returns:
        Bool masks of the shape of ``calibrated``, and the global counts.

    Raises:
        ValueError: the shapes differ.
    """
    return select_over([calibrated], [mask], selection, gather=gather)[0]


def select_over(
    calibrated: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    selection: SelectionConfig,
    *,
    gather: Gather | None = None,
) -> list[Selection]:
    """Do what :func:`select_tokens` does, over several micro-batches ranked together.

    A token's global position is that of its micro-batch first, of its rank second. ``gather`` is called once per
    micro-batch, of which there must be one at least.

    Args:
        calibrated: s(t) of each micro-batch, nats, any shape.
        masks: bool, of the shapes of ``calibrated``, True for tokens that are ranked; None takes all but NaN.
        selection: shares and threshold.
        gather: as for :func:`select_tokens`.

    Returns:
        One selection per micro-batch; their counts are those of all together.

    Raises:
        ValueError: a mask has another shape than its ``calibrated``.
    """
    ranked, gathered, positions = [], [], []
    start = 0
    for part, mask in zip(calibrated, masks, strict=True):
        values = part.detach().float()
        valid = full_mask(part, mask) & ~values.isnan()
        own_m = values[valid]
        everyone, offset = (own_m, 0) if gather is None else gather(own_m)
        ranked.append(valid)
        gathered.append(everyone)
        positions.append(slice(start + offset, start + offset + len(own_m)))
        start += len(everyone)
    hard_n, memorized_n, counts = _rank(torch.cat(gathered), selection)
    return [
        Selection(
            torch.zeros_like(valid).masked_scatter(valid, hard_n[here]),
            torch.zeros_like(valid).masked_scatter(valid, memorized_n[here]),
            counts,
        )
        for valid, here in zip(ranked, positions, strict=True)
    ]


def _rank(calibrated_n: torch.Tensor, selection: SelectionConfig) -> Selection:
    """Return T_h and T_m of values s(t) in the order of their global positions."""
    n = len(calibrated_n)
    n_hard = set_size(selection.hard_share, n)
    if n and selection.hard_share > 0:
        n_hard = max(n_hard, 1)
    n_memorized = min(set_size(selection.memorized_share, n), n - n_hard)

    order = torch.sort(calibrated_n, descending=True, stable=True).indices
    # Back in the order of positions, so that the second stable sort, too, takes the lower one of two equals.
    rest = torch.sort(order[n_hard:]).values
    lowest = rest[torch.sort(calibrated_n[rest], stable=True).indices[:n_memorized]]

    hard_n = torch.zeros(n, dtype=torch.bool, device=calibrated_n.device)
    hard_n[order[:n_hard]] = True
    memorized_n = torch.zeros_like(hard_n)
    memorized_n[lowest] = calibrated_n[lowest] < selection.tau
    return Selection(hard_n, memorized_n, SelectionCounts(n, n_hard, int(memorized_n.sum())))


def world_size_of(gather: Gather | None, device: torch.device) -> int:
    """Return the number of ranks; a gather that does not know it is called to find out."""
    if gather is None:
        return 1
    known = getattr(gather, "world_size", None)
    return len(gather(torch.ones(1, device=device))[0]) if known is None else int(known)


def set_size(share: float, n: int) -> int:
    """Return floor(share * n), forgiving the rounding of the product (:data:`ROUNDING`)."""
    return math.floor(share * n + ROUNDING)


def full_mask(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return ``mask`` as bool, or a mask that takes all of ``values``.

    Raises:
        ValueError: the shapes differ.
    """
    if mask is None:
        return torch.ones_like(values, dtype=torch.bool)
    if mask.shape != values.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, the values {tuple(values.shape)}; they must agree")
    return mask.bool()
