"""Which tokens are learned (hard) and which are unlearned (memorised).

Legend: n = tokens that are ranked, over all ranks when a ``gather`` is given; m = those of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch

Gather = Callable[[torch.Tensor], tuple[torch.Tensor, int]]
"""This rank's 1-D float32 values -> (all ranks' values concatenated in rank order, this rank's offset in them).
Ranks may hold different numbers of values, some none. One with an attribute ``world_size``, as :class:`RankGather`
has, need not be called to learn it."""

Normalize = Literal["per_set", "per_share"]
Scope = Literal["micro_batch", "local", "step"]

ROUNDING = 1e-9
"""Added before the floor of share * n: in floating point 0.29 * 100 is 28.999999999999996, and 29 tokens are meant."""


@dataclass(frozen=True)
class SelectionConfig:
    """Shares, threshold and weight of the dual loss."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    hard_share: float = 0.6
    """K_h, share of all predicted tokens that are learned: those with the highest s(t). Default: paper."""

    memorised_share: float = 0.2
    """K_m, largest share of all predicted tokens that are unlearned: those with the lowest s(t). Default: paper."""

    tau: float = 0.0
    """Only tokens with s(t) strictly below this, in nats, are unlearned. Default: paper."""

    alpha: float = 0.8
    """Weight of the unlearning term, no unit. Default: paper, which reports divergence at 1.5-2."""

    normalize: Normalize = "per_set"
    """What the sum over T_m is divided by: its size (``per_set``), or memorised_share * n (``per_share``), so that a
    nearly empty T_m cannot give a few tokens a huge weight. The paper does not say; ``per_set`` is dualtok's reading of
    it."""

    scope: Scope = "micro_batch"
    """Tokens that are ranked together: one micro-batch over all data-parallel ranks (``micro_batch``); this rank's part
    of it alone (``local``: no communication, but results depend on the number of ranks); or all micro-batches of an
    optimiser step (``step``: results do not depend on gradient accumulation, but with it every step runs one more
    forward pass, without gradients). The paper has one GPU, hence one micro-batch."""

    def __post_init__(self) -> None:
        """Refuse shares, thresholds and weights that mean nothing."""
        check_shares(self.hard_share, self.memorised_share)
        check_alpha(self.alpha)
        check_choice("normalize", self.normalize, get_args(Normalize))
        check_choice("scope", self.scope, get_args(Scope))
        if not math.isfinite(self.tau):
            raise ValueError(f"selection.tau: must be finite, got {self.tau}")


class SelectionCounts(NamedTuple):
    """Sizes over the whole scope, all ranks included."""

    tokens: int
    """n, all tokens that were ranked."""
    hard: int
    memorised: int


@dataclass(frozen=True)
class RankGather:
    """A gather that knows the number of ranks, which saves a collective per micro-batch."""

    collect: Gather
    world_size: int

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return what ``collect`` returns."""
        return self.collect(values)


class Selection(NamedTuple):
    """The two disjoint sets, as masks of this rank's scores, and their global sizes."""

    hard: torch.Tensor
    memorised: torch.Tensor
    counts: SelectionCounts


def select_tokens(
    scores: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    hard_share: float = 0.6,
    memorised_share: float = 0.2,
    tau: float = 0.0,
    gather: Gather | None = None,
) -> Selection:
    """Choose T_h, the highest scores, and T_m, the lowest scores below ``tau`` (DuoLearn, arXiv 2502.19726).

    * |T_h| = floor(hard_share * n), at least 1 when n and ``hard_share`` are positive.
    * |T_m| <= floor(memorised_share * n); only scores strictly below ``tau``. A share of 0 is an empty set.
    * The sets never overlap: T_m is drawn from what T_h leaves (a lone token is learned, not unlearned).
    * Equal scores are taken in the order of their global position, the lower one first, in both sets.
    * Infinities rank as what they are. A NaN cannot be ranked: it is left out as if it were masked, so it is neither
      learned nor unlearned nor counted in n. Where the reference is broken a token must not be trained on without its
      defence.

    Sorting makes it O(n log n). The host waits for the device where the number of ranked tokens must be known, and once
    for the size of T_m.

    Args:
        scores: s(t), any shape, any float dtype; ranked in float32.
        mask: bool, same shape, True for real, predicted tokens; None takes all. What stands in masked positions is
            ignored.
        hard_share: K_h, in [0, 1].
        memorised_share: K_m, in [0, 1 - hard_share].
        tau: upper bound (excluded) of the scores in T_m, nats.
        gather: collects the scores of all ranks; None ranks these alone. Every rank must call this function equally
            often.

    Returns:
        Bool masks of the shape of ``scores``, and the global counts.

    Raises:
        ValueError: the shapes differ, a share lies outside [0, 1], the shares sum above 1, or ``tau`` is NaN.
    """
    return select_over(
        [scores], [mask], hard_share=hard_share, memorised_share=memorised_share, tau=tau, gather=gather
    )[0]


def select_over(
    scores: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    *,
    hard_share: float,
    memorised_share: float,
    tau: float,
    gather: Gather | None = None,
) -> list[Selection]:
    """Do what :func:`select_tokens` does, over several micro-batches ranked together.

    A token's global position is that of its micro-batch first, of its rank second. ``gather`` is called once per
    micro-batch, of which there must be one at least.
    """
    check_shares(hard_share, memorised_share)
    if math.isnan(tau):
        raise ValueError("tau must be a number, got NaN")
    ranked, gathered, places = [], [], []
    start = 0
    for part, mask in zip(scores, masks, strict=True):
        values = part.detach().float()
        valid = full_mask(part, mask) & ~values.isnan()
        own_m = values[valid]
        everyone, offset = (own_m, 0) if gather is None else gather(own_m)
        ranked.append(valid)
        gathered.append(everyone)
        places.append(slice(start + offset, start + offset + len(own_m)))
        start += len(everyone)
    hard_n, memorised_n, counts = _rank(torch.cat(gathered), hard_share, memorised_share, tau)
    return [
        Selection(
            torch.zeros_like(valid).masked_scatter(valid, hard_n[here]),
            torch.zeros_like(valid).masked_scatter(valid, memorised_n[here]),
            counts,
        )
        for valid, here in zip(ranked, places, strict=True)
    ]


def _rank(scores_n: torch.Tensor, hard_share: float, memorised_share: float, tau: float) -> Selection:
    """Return T_h and T_m among scores in the order of their global positions."""
    n = len(scores_n)
    n_hard = set_size(hard_share, n)
    if n and hard_share > 0:
        n_hard = max(n_hard, 1)
    n_memorised = min(set_size(memorised_share, n), n - n_hard)

    order = torch.sort(scores_n, descending=True, stable=True).indices
    # Back in the order of positions, so that the second stable sort, too, takes the lower one of two equals.
    rest = torch.sort(order[n_hard:]).values
    lowest = rest[torch.sort(scores_n[rest], stable=True).indices[:n_memorised]]

    hard_n = torch.zeros(n, dtype=torch.bool, device=scores_n.device)
    hard_n[order[:n_hard]] = True
    memorised_n = torch.zeros_like(hard_n)
    memorised_n[lowest] = scores_n[lowest] < tau
    return Selection(hard_n, memorised_n, SelectionCounts(n, n_hard, int(memorised_n.sum())))


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


def check_alpha(alpha: float) -> None:
    """Raise ValueError for a weight of the unlearning term that is negative or not finite."""
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"selection.alpha: must be finite and not negative, got {alpha}")


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError for a value that is none of the known ones."""
    if value not in known:
        raise ValueError(f"selection.{name}: must be one of {', '.join(map(repr, known))}, got {value!r}")
