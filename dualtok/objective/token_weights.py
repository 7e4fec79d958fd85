"""How much each token counts, decided from losses without gradients, and the loss that follows from it.

Weights are made for one micro-batch or for all micro-batches of an optimizer step. Either way a micro-batch's loss is
the weighted sum of its token losses, so that there is one way from a selection to a gradient.

Legend: b batch, t position, n = tokens in the scope (all ranks when a ``gather`` is given).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from dualtok.objective.calibrate import calibrated_loss
from dualtok.objective.selection import Gather, SelectionCounts, full_mask, select_over, world_size_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualtok.objective.settings import SelectionConfig


@dataclass(frozen=True, eq=False)
class TokenWeights:
    """How the tokens of one micro-batch on this rank take part in the loss. Nothing in it carries a gradient."""

    factors: torch.Tensor
    """Factor of each token's loss, float32, of the token losses' shape; 0 for tokens that play no part."""

    predicted: torch.Tensor
    """Real, predicted tokens: bool, same shape."""

    hard: torch.Tensor
    """Tokens that are learned: bool, same shape."""

    memorized: torch.Tensor
    """Tokens that are unlearned: bool, same shape."""

    calibrated: torch.Tensor
    """s(t): float32, same shape, 0 where masked, NaN where a loss is; all 0 when no reference losses were given."""

    counts: SelectionCounts
    """Sizes of the sets over the whole scope, all ranks (and micro-batches, for ``scope: step``) included."""

    totals: torch.Tensor
    """[3, 2] float64 on the device of the losses, for this rank alone: rows T_h, T_m and all predicted tokens; columns
    the sum of their token losses (nats) and their number. Add them up over micro-batches and ranks, then divide."""

    @property
    def hard_loss(self) -> torch.Tensor:
        """Mean CE over this rank's part of T_h, nats; NaN when it is empty."""
        return self.totals[0, 0] / self.totals[0, 1]

    @property
    def memorized_loss(self) -> torch.Tensor:
        """Mean CE over this rank's part of T_m, nats; NaN when it is empty."""
        return self.totals[1, 0] / self.totals[1, 1]

    @property
    def plain_loss(self) -> torch.Tensor:
        """Mean CE over this rank's predicted tokens, nats; NaN when there are none."""
        return self.totals[2, 0] / self.totals[2, 1]


class WeightedLoss(NamedTuple):
    """The loss of one (micro-)batch, and how each token took part in it. Only ``loss`` carries a gradient."""

    loss: torch.Tensor
    """Scalar, float32. With a ``gather``, the mean of the ranks' losses is the loss of the whole batch."""

    weights: TokenWeights


def apply_weights(weights: TokenWeights, token_loss: torch.Tensor) -> WeightedLoss:
    """Return the loss of a micro-batch, the sum of factors * losses in float32.

    Every token stays in the graph with its factor, be it 0: a rank without selected tokens must run the same backward
    pass as the others, as under ZeRO-3 each layer's backward is a collective. ``where`` keeps masked NaNs out of value
    and gradient.

    Args:
        weights: made from these losses or, for ``scope: step``, from the same weights' losses in an earlier pass; then
            losses of tokens whose factor is 0 need not have been computed.
        token_loss: CE(theta; t) with gradient, nats, of the weights' shape.
    """
    loss = (torch.where(weights.predicted, token_loss.float(), 0.0) * weights.factors).sum()
    return WeightedLoss(loss, weights)


def dual_weights(
    token_losses: Sequence[torch.Tensor],
    reference_losses: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    selection: SelectionConfig,
    *,
    gather: Gather | None = None,
) -> list[TokenWeights]:
    """Choose T_h and T_m among all the given micro-batches together; arguments as for ``dual_loss``, one per part.

    With more than one part, factors are multiplied by their number, as the engine takes the mean of their losses.

    Returns:
        The weights of each part.
    """
    token_losses = [losses.detach() for losses in token_losses]
    full = [full_mask(losses, mask) for losses, mask in zip(token_losses, masks, strict=True)]
    calibrated = [
        torch.where(mask, calibrated_loss(losses, reference), 0.0)
        for losses, reference, mask in zip(token_losses, reference_losses, full, strict=True)
    ]
    chosen = select_over(calibrated, full, selection, gather=gather)
    counts = chosen[0].counts
    means = len(chosen) * world_size_of(gather, calibrated[0].device)
    # An empty T_m weighs nothing under either: one over a tiny share would be infinite, and times 0 not a number.
    per_share = selection.normalize == "per_share" and counts.memorized > 0
    learned = _one_over(counts.hard)
    unlearned = selection.alpha * _one_over(
        selection.memorized_share * counts.tokens if per_share else counts.memorized
    )
    by_confidence = selection.unlearn == "confidence"
    return [
        TokenWeights(
            factors=means * (learned * hard.float() - unlearned * _strength(losses, memorized, by_confidence)),
            predicted=mask,
            hard=hard,
            memorized=memorized,
            calibrated=s,
            counts=counts,
            totals=_totals(losses, hard, memorized, mask),
        )
        for losses, s, mask, (hard, memorized, _) in zip(token_losses, calibrated, full, chosen, strict=True)
    ]


def mean_weights(
    token_loss: torch.Tensor,
    predicted: torch.Tensor,
    learned: torch.Tensor,
    reference_loss: torch.Tensor | None = None,
    gather: Gather | None = None,
) -> TokenWeights:
    """Weigh for the mean CE over ``learned``, a subset of the ``predicted`` tokens of one micro-batch.

    Args:
        token_loss: CE of each token [b, t], nats.
        predicted: bool [b, t], True for real, predicted tokens.
        learned: bool [b, t], within ``predicted``; they count as hard.
        reference_loss: [b, t]; only fills ``calibrated``, for monitoring.
        gather: collects both numbers of all ranks; called once, on every rank.
    """
    token_loss = token_loss.detach()
    # Gathered as float32, as the contract of ``gather`` says: exact up to 16.7 million tokens per rank and micro-batch.
    own = torch.stack([predicted.sum(), learned.sum()]).float()
    sizes = (own if gather is None else gather(own)[0]).view(-1, 2)
    tokens, kept = (int(size) for size in sizes.double().sum(0).tolist())
    s = torch.zeros_like(token_loss, dtype=torch.float32)
    if reference_loss is not None:
        s = torch.where(predicted, calibrated_loss(token_loss, reference_loss), s)
    nothing = torch.zeros_like(learned)
    return TokenWeights(
        factors=len(sizes) * _one_over(kept) * learned.float(),
        predicted=predicted,
        hard=learned,
        memorized=nothing,
        calibrated=s,
        counts=SelectionCounts(tokens, kept, 0),
        totals=_totals(token_loss, learned, nothing, predicted),
    )


def _strength(token_loss: torch.Tensor, memorized: torch.Tensor, by_confidence: bool) -> torch.Tensor:
    """Return how strongly each token of T_m is unlearned: with 1, or with its probability; 0 for all others."""
    if not by_confidence:
        return memorized.float()
    return torch.where(memorized, (-token_loss.float()).exp(), 0.0)


def _one_over(size: float) -> float:
    """Return 1 / size, the weight of each token in a mean; 0 for an empty set, which contributes nothing."""
    return 1.0 / size if size > 0 else 0.0


def _totals(token_loss: torch.Tensor, *sets: torch.Tensor) -> torch.Tensor:
    """Return [len(sets), 2] float64: each set's sum of token losses and its size; never waits for the device."""
    losses = token_loss.double()
    return torch.stack([torch.stack([torch.where(s, losses, 0.0).sum(), s.sum().double()]) for s in sets])
