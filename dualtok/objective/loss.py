"""The dual loss and the objectives it is compared with, on one interface.

Legend: b batch, t position, n = tokens in the scope (all ranks when a ``gather`` is given).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, get_args

import torch

from dualtok.objective.calibrate import calibrated_loss
from dualtok.objective.goldfish import GoldfishConfig, goldfish_mask
from dualtok.objective.head import IGNORED_LABEL
from dualtok.objective.selection import (
    Gather,
    Normalize,
    SelectionConfig,
    SelectionCounts,
    check_alpha,
    check_choice,
    full_mask,
    select_tokens,
)

__all__ = [
    "OBJECTIVES",
    "Batch",
    "CausalLM",
    "Dual",
    "DualLoss",
    "Goldfish",
    "GoldfishConfig",
    "Objective",
    "Selective",
    "build_objective",
    "causal_lm_loss",
    "dual_loss",
    "goldfish_loss",
    "goldfish_mask",
    "selective_loss",
]

Batch = Mapping[str, torch.Tensor]
"""``input_ids``, ``position_ids``, ``labels`` [b, t] int64 and, for some objectives, ``reference_loss`` [b, t]
float32."""


@dataclass(frozen=True, eq=False)
class DualLoss:
    """The loss of one (micro-)batch, and how each token took part in it. Only ``loss`` carries a gradient."""

    loss: torch.Tensor
    """Scalar, float32. With a ``gather``, the mean of the ranks' losses is the loss of the whole batch."""

    hard: torch.Tensor
    """Tokens that are learned: bool, of the token losses' shape."""

    memorised: torch.Tensor
    """Tokens that are unlearned: bool, same shape."""

    calibrated: torch.Tensor
    """s(t): float32, same shape, 0 where masked, NaN where a loss is; all 0 when no reference losses were given."""

    counts: SelectionCounts
    """Sizes of the sets over the whole scope, all ranks included."""

    totals: torch.Tensor
    """[3, 2] float64 on the device of the losses, for this rank alone: rows T_h, T_m and all predicted tokens; columns
    the sum of their token losses (nats) and their number. Add them up over micro-batches and ranks, then divide."""

    @property
    def hard_loss(self) -> torch.Tensor:
        """Mean CE over this rank's part of T_h, nats; NaN when it is empty."""
        return self.totals[0, 0] / self.totals[0, 1]

    @property
    def memorised_loss(self) -> torch.Tensor:
        """Mean CE over this rank's part of T_m, nats; NaN when it is empty."""
        return self.totals[1, 0] / self.totals[1, 1]

    @property
    def plain_loss(self) -> torch.Tensor:
        """Mean CE over this rank's predicted tokens, nats; NaN when there are none."""
        return self.totals[2, 0] / self.totals[2, 1]


def dual_loss(
    token_loss: torch.Tensor,
    reference_loss: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    hard_share: float = 0.6,
    memorised_share: float = 0.2,
    tau: float = 0.0,
    alpha: float = 0.8,
    normalize: Normalize = "per_set",
    gather: Gather | None = None,
) -> DualLoss:
    """Return L = mean CE over T_h - alpha * mean CE over T_m (DuoLearn, arXiv 2502.19726).

    T_h and T_m as :func:`~dualtok.objective.selection.select_tokens` says. An empty set contributes 0; without any
    token the loss is 0 with a zero gradient. What stands in masked positions, NaN and infinity included, touches
    neither the value nor the gradient. A NaN in the ``token_loss`` of a predicted token, selected or not, makes the
    loss NaN: training has broken down, and whoever steps the optimiser must see it. A NaN in its ``reference_loss``
    alone leaves the token out.

    Args:
        token_loss: CE(theta; t) with gradient, nats, any shape, any float dtype; summed in float32.
        reference_loss: CE(theta_ref; t), nats, same shape.
        mask: bool, same shape, True for real, predicted tokens; None takes all.
        hard_share: K_h, in [0, 1].
        memorised_share: K_m, in [0, 1 - hard_share].
        tau: only s(t) < tau is unlearned, nats.
        alpha: weight of the unlearning term, >= 0.
        normalize: ``per_set`` divides the sum over T_m by its size, ``per_share`` by memorised_share * n.
        gather: collects the scores of all ranks. The sets and their sizes are then those of the whole batch, and the
            loss is multiplied by the number of ranks, so that the mean over ranks that data-parallel engines take of
            losses and gradients is exact, however unevenly the tokens are spread. It is called twice, on every rank.

    Raises:
        ValueError: shapes differ, a share lies outside [0, 1], the shares sum above 1, ``alpha`` is negative or
            ``normalize`` is unknown.
    """
    check_alpha(alpha)
    check_choice("normalize", normalize, get_args(Normalize))
    mask = full_mask(token_loss, mask)
    s = torch.where(mask, calibrated_loss(token_loss, reference_loss), 0.0)
    hard, memorised, counts = select_tokens(
        s, mask, hard_share=hard_share, memorised_share=memorised_share, tau=tau, gather=gather
    )
    world_size = 1 if gather is None else len(gather(torch.ones(1, device=token_loss.device))[0])
    # An empty T_m weighs nothing under either: one over a tiny share would be infinite, and times 0 not a number.
    per_share = normalize == "per_share" and counts.memorised > 0
    unlearned = memorised_share * counts.tokens if per_share else counts.memorised
    weights = world_size * (_one_over(counts.hard) * hard.float() - alpha * _one_over(unlearned) * memorised.float())
    loss = _weighted_sum(token_loss, mask, weights)
    return DualLoss(loss, hard, memorised, s, counts, _totals(token_loss, hard, memorised, mask))


def selective_loss(
    token_loss: torch.Tensor,
    reference_loss: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    hard_share: float = 0.6,
    gather: Gather | None = None,
) -> DualLoss:
    """Return the mean CE over T_h: the learning half alone, as Rho-1 (Lin et al. 2024, arXiv 2404.07965).

    Nothing is unlearned, so ``memorised`` is empty. Everything else as for :func:`dual_loss`.
    """
    return dual_loss(
        token_loss, reference_loss, mask, hard_share=hard_share, memorised_share=0.0, alpha=0.0, gather=gather
    )


def causal_lm_loss(
    token_loss: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    reference_loss: torch.Tensor | None = None,
    gather: Gather | None = None,
) -> DualLoss:
    """Return the mean CE over all predicted tokens: plain training. All of them count as hard.

    Args:
        token_loss: CE(theta; t) with gradient, nats, any shape, any float dtype.
        mask: bool, same shape, True for real, predicted tokens; None takes all.
        reference_loss: same shape; only fills ``calibrated``, for monitoring.
        gather: collects values of all ranks, as for :func:`dual_loss`; called once, on every rank.

    Raises:
        ValueError: the shapes differ.
    """
    mask = full_mask(token_loss, mask)
    return _mean_loss(token_loss, mask, mask, reference_loss, gather)


def goldfish_loss(
    token_loss: torch.Tensor,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    drop_every: int = 4,
    context: int = 13,
    reference_loss: torch.Tensor | None = None,
    gather: Gather | None = None,
) -> DualLoss:
    """Return the mean CE over the tokens that :func:`goldfish_mask` keeps (Hans et al. 2024, arXiv 2406.10209).

    The kept tokens count as hard, nothing is unlearned, and ``counts.tokens`` has the dropped ones as well.

    Args:
        token_loss: CE(theta; t) with gradient, [b, t], nats.
        input_ids: as for :func:`goldfish_mask`.
        position_ids: likewise.
        labels: likewise.
        drop_every: likewise.
        context: likewise.
        reference_loss: [b, t]; only fills ``calibrated``, for monitoring.
        gather: collects values of all ranks, as for :func:`dual_loss`; called once, on every rank.

    Raises:
        ValueError: the shapes differ.
    """
    kept = goldfish_mask(input_ids, position_ids, labels, drop_every=drop_every, context=context).to(token_loss.device)
    predicted = full_mask(token_loss, (labels != IGNORED_LABEL).to(token_loss.device))
    return _mean_loss(token_loss, predicted, kept, reference_loss, gather)


class Objective(Protocol):
    """What the engine calls with this rank's token losses."""

    needs_reference: ClassVar[bool]
    """Whether the batch must have ``reference_loss``; the others only report s(t) when it is there."""

    def __call__(self, token_loss: torch.Tensor, batch: Batch, gather: Gather | None = None) -> DualLoss:
        """Return the loss of a batch: ``token_loss`` [b, t] is aligned with ``batch["labels"]``."""


@dataclass(frozen=True)
class Dual:
    """:func:`dual_loss` with its settings; with ``scope: local`` each rank ranks and averages its own tokens alone."""

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
    """:func:`selective_loss`; of the settings only ``hard_share`` and ``scope`` matter."""

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
        return causal_lm_loss(
            token_loss, _predicted(token_loss, batch), reference_loss=_reference(token_loss, batch), gather=gather
        )


@dataclass(frozen=True)
class Goldfish:
    """:func:`goldfish_loss` with its settings."""

    config: GoldfishConfig = field(default_factory=GoldfishConfig)
    needs_reference: ClassVar[bool] = False

    def __call__(self, token_loss: torch.Tensor, batch: Batch, gather: Gather | None = None) -> DualLoss:
        """Return the Goldfish loss of a batch."""
        return goldfish_loss(
            token_loss,
            batch["input_ids"],
            batch["position_ids"],
            batch["labels"],
            drop_every=self.config.drop_every,
            context=self.config.context,
            reference_loss=_reference(token_loss, batch),
            gather=gather,
        )


OBJECTIVES: dict[str, type[Dual | Selective | CausalLM | Goldfish]] = {
    "dual": Dual,
    "causal_lm": CausalLM,
    "selective": Selective,
    "goldfish": Goldfish,
}
"""Name -> class of every objective; :func:`build_objective` makes one."""


def build_objective(
    name: str, selection: SelectionConfig | None = None, goldfish: GoldfishConfig | None = None
) -> Objective:
    """Return the objective of a name in :data:`OBJECTIVES`; settings left out take their defaults.

    Raises:
        ValueError: there is no such objective.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective: {name!r} is none of {', '.join(OBJECTIVES)}")
    objectives: dict[str, Objective] = {
        "dual": Dual(selection or SelectionConfig()),
        "causal_lm": CausalLM(),
        "selective": Selective(selection or SelectionConfig()),
        "goldfish": Goldfish(goldfish or GoldfishConfig()),
    }
    return objectives[name]


def _mean_loss(
    token_loss: torch.Tensor,
    predicted: torch.Tensor,
    learned: torch.Tensor,
    reference_loss: torch.Tensor | None,
    gather: Gather | None,
) -> DualLoss:
    """Return the mean CE over ``learned``, a subset of the ``predicted`` tokens."""
    # Gathered as float32, as the contract of ``gather`` says: exact up to 16.7 million tokens per rank and micro-batch.
    own = torch.stack([predicted.sum(), learned.sum()]).float()
    sizes = (own if gather is None else gather(own)[0]).view(-1, 2)
    tokens, kept = (int(size) for size in sizes.double().sum(0).tolist())
    loss = _weighted_sum(token_loss, predicted, len(sizes) * _one_over(kept) * learned.float())
    s = torch.zeros_like(token_loss, dtype=torch.float32)
    if reference_loss is not None:
        s = torch.where(predicted, calibrated_loss(token_loss, reference_loss), s)
    nothing = torch.zeros_like(learned)
    return DualLoss(
        loss,
        learned,
        nothing,
        s,
        SelectionCounts(tokens, kept, 0),
        _totals(token_loss, learned, nothing, predicted),
    )


def _predicted(token_loss: torch.Tensor, batch: Batch) -> torch.Tensor:
    return (batch["labels"] != IGNORED_LABEL).to(token_loss.device)


def _reference(token_loss: torch.Tensor, batch: Batch) -> torch.Tensor | None:
    reference_loss = batch.get("reference_loss")
    return None if reference_loss is None else reference_loss.to(token_loss.device)


def _one_over(size: float) -> float:
    """Return 1 / size, the weight of each token in a mean; 0 for an empty set, which contributes nothing."""
    return 1.0 / size if size > 0 else 0.0


def _weighted_sum(token_loss: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the sum of weights * losses in float32.

    Every token stays in the graph with its weight, be it 0: a rank without selected tokens must run the same backward
    pass as the others, as under ZeRO-3 each layer's backward is a collective. ``where`` keeps masked NaNs out of value
    and gradient.
    """
    return (torch.where(mask, token_loss.float(), 0.0) * weights).sum()


def _totals(token_loss: torch.Tensor, *sets: torch.Tensor) -> torch.Tensor:
    """Return [len(sets), 2] float64: each set's sum of token losses and its size; never waits for the device."""
    losses = token_loss.detach().double()
    return torch.stack([torch.stack([torch.where(s, losses, 0.0).sum(), s.sum().double()]) for s in sets])
