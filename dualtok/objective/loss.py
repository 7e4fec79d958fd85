"""The dual loss and the objectives it is compared with, on one interface.

Legend: n = predicted tokens in the scope (all ranks when a ``gather`` is given), b batch, t position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch

from dualtok.objective.calibrate import calibrated_loss
from dualtok.objective.selection import Gather, SelectionConfig, SelectionCounts, _full_mask, select_tokens

IGNORED_LABEL = -100
Batch = Mapping[str, torch.Tensor]

# Odd constants of a 64-bit multiplicative hash (the fractional bits of the golden ratio, and the murmur3 finaliser's), as signed
# integers: torch multiplies int64 with wrap-around.
_HASH_FACTOR = -7046029254386353131
_HASH_MIX = -49064778989728563


@dataclass(frozen=True)
class DualLoss:
    """The loss of one (micro-)batch, and how each token took part in it."""

    loss: torch.Tensor
    """Scalar with gradient. With a ``gather`` it is scaled such that the mean over ranks is the global loss."""
    hard: torch.Tensor
    """Tokens that are learned, bool, of the token losses' shape."""
    memorised: torch.Tensor
    """Tokens that are unlearned, bool, same shape."""
    calibrated: torch.Tensor
    """s(t), float32, same shape, 0 where masked; all 0 for objectives without a reference."""
    counts: SelectionCounts
    """Sizes of the sets over the whole scope."""


def dual_loss(
    token_loss: torch.Tensor,
    reference_loss: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    hard_share: float = 0.6,
    memorised_share: float = 0.2,
    tau: float = 0.0,
    alpha: float = 0.8,
    normalize: Literal["per_set", "per_share"] = "per_set",
    gather: Gather | None = None,
) -> DualLoss:
    """Return L = mean CE over T_h - alpha * mean CE over T_m (DuoLearn, arXiv 2502.19726).

    An empty set contributes 0; without any token the loss is 0 with a zero gradient. What stands in masked positions, NaN
    included, touches neither the value nor the gradient.

    Args:
        token_loss: CE(theta; t) with gradient, any shape, any float dtype.
        reference_loss: CE(theta_ref; t), same shape.
        mask: same shape, True for real, predicted tokens; None takes all.
        hard_share: K_h.
        memorised_share: K_m.
        tau: only s(t) < tau is unlearned, nats.
        alpha: weight of the unlearning term.
        normalize: ``per_set`` divides the sum over T_m by its size, ``per_share`` by memorised_share * n.
        gather: collects 1-D float32 values of all ranks; selection and counts are then global, and the loss is scaled by the
            world size.

    Raises:
        ValueError: shapes differ, the shares sum above 1, or ``normalize`` is unknown.
    """
    if normalize not in ("per_set", "per_share"):
        raise ValueError(f"normalize must be 'per_set' or 'per_share', got {normalize!r}")
    mask = _full_mask(token_loss, mask)
    s = torch.where(mask, calibrated_loss(token_loss, reference_loss), 0.0)
    hard, memorised, counts = select_tokens(
        s, mask, hard_share=hard_share, memorised_share=memorised_share, tau=tau, gather=gather
    )
    unlearned = counts.memorised if normalize == "per_set" else memorised_share * counts.tokens
    weights = _share(hard, counts.hard) - alpha * _share(memorised, unlearned)
    loss = _weighted_sum(token_loss, mask, weights) * _world_size(gather, mask.device)
    return DualLoss(loss, hard, memorised, s, counts)


def selective_loss(
    token_loss: torch.Tensor,
    reference_loss: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    hard_share: float = 0.6,
    gather: Gather | None = None,
) -> DualLoss:
    """Return the mean CE over T_h alone: the learning half, alpha = 0 (as Rho-1, arXiv 2404.07965). Nothing is unlearned."""
    return dual_loss(
        token_loss, reference_loss, mask, hard_share=hard_share, memorised_share=0.0, alpha=0.0, gather=gather
    )


def causal_lm_loss(
    token_loss: torch.Tensor, mask: torch.Tensor | None = None, *, gather: Gather | None = None
) -> DualLoss:
    """Return the mean CE over all predicted tokens: plain training. Every token counts as hard."""
    mask = _full_mask(token_loss, mask)
    own = mask.sum()
    total, world_size = own, 1
    if gather is not None:
        counts, _ = gather(own.float().reshape(1))
        total, world_size = counts.double().sum().long(), len(counts)
    n = int(total)
    loss = _weighted_sum(token_loss, mask, _share(mask, n)) * world_size
    none = torch.zeros_like(mask)
    s = torch.zeros_like(token_loss, dtype=torch.float32)
    return DualLoss(loss, mask, none, s, SelectionCounts(n, n, 0))


def goldfish_mask(
    input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor, *, drop_every: int = 4, context: int = 13
) -> torch.Tensor:
    """Return which tokens stay in the Goldfish loss (Hans et al. 2024, arXiv 2406.10209).

    A token is dropped when the hash of the ``context`` tokens before it is a multiple of ``drop_every``. The hash sees only those
    tokens, so the same passage loses the same tokens in every epoch and wherever it is packed. A token with fewer than ``context``
    tokens before it in its piece is kept.

    Args:
        input_ids: [b, t] int64.
        position_ids: [b, t] int64, from 0 at the start of each piece.
        labels: [b, t] int64, already shifted; -100 is never kept.
        drop_every: one token in so many is dropped, on average.
        context: tokens that are hashed.

    Returns:
        Bool [b, t], aligned with ``labels``.
    """
    hashed = torch.zeros_like(input_ids)
    for back in range(context - 1, -1, -1):
        earlier = torch.nn.functional.pad(input_ids, (back, 0))[..., : input_ids.shape[-1]]
        hashed = (hashed + earlier + 1) * _HASH_FACTOR
        # Without mixing, the low bits of a product depend on the low bits of its factors alone.
        hashed = (hashed ^ ((hashed >> 29) & ((1 << 35) - 1))) * _HASH_MIX
    hashed = (hashed >> 16) & ((1 << 47) - 1)
    dropped = (hashed % drop_every == 0) & (position_ids + 1 >= context)
    return (labels != IGNORED_LABEL) & ~dropped


@dataclass(frozen=True)
class GoldfishConfig:
    """Which tokens the Goldfish objective never learns."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    drop_every: int = 4
    """One token in so many is left out, on average. Default: Hans et al. 2024 (k = 4)."""

    context: int = 13
    """Preceding tokens that decide by their hash. Default: Hans et al. 2024."""

    def __post_init__(self) -> None:
        """Refuse values that would drop everything or hash nothing."""
        if self.drop_every < 2:
            raise ValueError(f"goldfish.drop_every: must be at least 2, got {self.drop_every}")
        if self.context < 1:
            raise ValueError(f"goldfish.context: must be at least 1, got {self.context}")


class Objective(Protocol):
    """What the engine calls with this rank's token losses."""

    needs_reference: ClassVar[bool]

    def __call__(self, token_loss: torch.Tensor, batch: Batch, gather: Gather | None = None) -> DualLoss:
        """Return the loss of a batch: ``token_loss`` [b, t] is aligned with ``batch["labels"]``."""


@dataclass(frozen=True)
class Dual:
    """:func:`dual_loss` with its settings."""

    config: SelectionConfig = field(default_factory=SelectionConfig)
    needs_reference: ClassVar[bool] = True

    def __call__(self, token_loss: torch.Tensor, batch: Batch, gather: Gather | None = None) -> DualLoss:
        """Return the dual loss of a batch with ``reference_loss``."""
        settings = self.config
        return dual_loss(
            token_loss,
            batch["reference_loss"].to(token_loss.device),
            _predicted(token_loss, batch),
            hard_share=settings.hard_share,
            memorised_share=settings.memorised_share,
            tau=settings.tau,
            alpha=settings.alpha,
            normalize=settings.normalize,
            gather=gather if settings.scope == "micro_batch" else None,
        )


@dataclass(frozen=True)
class Selective:
    """:func:`selective_loss` with its settings."""

    config: SelectionConfig = field(default_factory=SelectionConfig)
    needs_reference: ClassVar[bool] = True

    def __call__(self, token_loss: torch.Tensor, batch: Batch, gather: Gather | None = None) -> DualLoss:
        """Return the selective loss of a batch with ``reference_loss``."""
        return selective_loss(
            token_loss,
            batch["reference_loss"].to(token_loss.device),
            _predicted(token_loss, batch),
            hard_share=self.config.hard_share,
            gather=gather if self.config.scope == "micro_batch" else None,
        )


@dataclass(frozen=True)
class CausalLM:
    """:func:`causal_lm_loss`."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, token_loss: torch.Tensor, batch: Batch, gather: Gather | None = None) -> DualLoss:
        """Return the plain loss of a batch."""
        return causal_lm_loss(token_loss, _predicted(token_loss, batch), gather=gather)


@dataclass(frozen=True)
class Goldfish:
    """:func:`causal_lm_loss` over the tokens that :func:`goldfish_mask` keeps."""

    config: GoldfishConfig = field(default_factory=GoldfishConfig)
    needs_reference: ClassVar[bool] = False

    def __call__(self, token_loss: torch.Tensor, batch: Batch, gather: Gather | None = None) -> DualLoss:
        """Return the Goldfish loss of a batch."""
        kept = goldfish_mask(
            batch["input_ids"], batch["position_ids"], batch["labels"],
            drop_every=self.config.drop_every, context=self.config.context,
        )  # fmt: skip
        return causal_lm_loss(token_loss, kept.to(token_loss.device), gather=gather)


def build_objective(
    name: str, selection: SelectionConfig | None = None, goldfish: GoldfishConfig | None = None
) -> Objective:
    """Return the objective ``dual``, ``selective``, ``goldfish`` or ``causal_lm``; settings left out take their defaults.

    Raises:
        ValueError: there is no such objective.
    """
    objectives: dict[str, Objective] = {
        "dual": Dual(selection or SelectionConfig()),
        "selective": Selective(selection or SelectionConfig()),
        "goldfish": Goldfish(goldfish or GoldfishConfig()),
        "causal_lm": CausalLM(),
    }
    if name not in objectives:
        raise ValueError(f"objective: {name!r} is none of {', '.join(objectives)}")
    return objectives[name]


def _predicted(token_loss: torch.Tensor, batch: Batch) -> torch.Tensor:
    return (batch["labels"] != IGNORED_LABEL).to(token_loss.device)


def _share(chosen: torch.Tensor, size: float) -> torch.Tensor:
    """Return the weight 1/size for chosen tokens and 0 for the others; all 0 for an empty set."""
    return chosen.float() * (1.0 / size if size > 0 else 0.0)


def _weighted_sum(token_loss: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum weights * losses; stays connected to every loss, as under ZeRO-3 a constant loss on one rank would hang the job."""
    return (torch.where(mask, token_loss.float(), 0.0) * weights).sum()


def _world_size(gather: Gather | None, device: torch.device) -> int:
    if gather is None:
        return 1
    known = getattr(gather, "world_size", None)
    return int(known) if known is not None else len(gather(torch.ones(1, device=device))[0])
