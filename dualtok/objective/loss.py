"""The dual loss and the objectives it is compared with, on one interface.

Legend: b batch, t position, n = tokens in the scope (all ranks when a ``gather`` is given).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import torch

from dualtok.objective.goldfish import goldfish_mask
from dualtok.objective.head import IGNORED_LABEL
from dualtok.objective.selection import Gather, full_mask
from dualtok.objective.settings import GoldfishConfig, ObjectiveName, SelectionConfig
from dualtok.objective.token_weights import TokenWeights, WeightedLoss, apply_weights, dual_weights, mean_weights

Batch = Mapping[str, torch.Tensor]
"""``input_ids``, ``position_ids``, ``labels`` [b, t] int64 and, for some objectives, ``reference_loss`` [b, t]
float32."""


def dual_loss(
    token_loss: torch.Tensor,
    reference_loss: torch.Tensor,
    mask: torch.Tensor | None = None,
    selection: SelectionConfig = SelectionConfig(),  # noqa: B008 - it is frozen
    *,
    gather: Gather | None = None,
) -> WeightedLoss:
    """Return L = mean CE over T_h - alpha * mean CE over T_m (DuoLearn, arXiv 2502.19726).

    T_h and T_m as :func:`~dualtok.objective.selection.select_tokens` says. An empty set contributes 0; without any
    token the loss is 0 with a zero gradient. What stands in masked positions, NaN and infinity included, touches
    neither the value nor the gradient. A NaN in the ``token_loss`` of a predicted token, selected or not, makes the
    loss NaN: training has broken down, and the caller must handle it. A NaN in its ``reference_loss``
    alone leaves the token out. With ``selection.unlearn: confidence`` the gradient is that of mean CE over T_h +
    alpha * mean probability over T_m, while the value stays a weighted sum of token losses.

    Args:
        token_loss: CE(theta; t) with gradient, nats, any shape, any float dtype; summed in float32.
        reference_loss: CE(theta_ref; t), nats, same shape.
        mask: bool, same shape, True for real, predicted tokens; None takes all.
        selection: shares, threshold and weight; its ``scope`` is the caller's affair, who passes a ``gather`` or none.
        gather: collects s(t) of all ranks. The sets and their sizes are then those of the whole batch, and the
            loss is multiplied by the number of ranks, so that the mean over ranks that data-parallel engines take of
            losses and gradients is exact, however unevenly the tokens are spread. It is called once on every rank, and
            once more if it does not know its ``world_size`` (:class:`~dualtok.objective.selection.RankGather` does).

    Raises:
        ValueError: the shapes differ.
    """
    weights = dual_weights([token_loss], [reference_loss], [mask], selection, gather=gather)[0]
    return apply_weights(weights, token_loss)


def selective_loss(
    token_loss: torch.Tensor,
    reference_loss: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    hard_share: float = 0.6,
    gather: Gather | None = None,
) -> WeightedLoss:
    """Return the mean CE over T_h: the learning half alone, as Rho-1 (Lin et al. 2024, arXiv 2404.07965).

    Nothing is unlearned, so ``memorized`` is empty. Everything else as for :func:`dual_loss`.

    Args:
        token_loss: as for :func:`dual_loss`.
        reference_loss: likewise.
        mask: likewise.
        hard_share: K_h, share of the tokens that are learned.
        gather: as for :func:`dual_loss`.

    Raises:
        ValueError: the shapes differ, or the share is not between 0 and 1.
    """
    return dual_loss(token_loss, reference_loss, mask, learning_half(SelectionConfig(hard_share)), gather=gather)


def causal_lm_loss(
    token_loss: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    reference_loss: torch.Tensor | None = None,
    gather: Gather | None = None,
) -> WeightedLoss:
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
    return apply_weights(mean_weights(token_loss, mask, mask, reference_loss, gather), token_loss)


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
) -> WeightedLoss:
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
    objective = Goldfish(GoldfishConfig(drop_every, context))
    batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
    if reference_loss is not None:
        batch["reference_loss"] = reference_loss
    return objective(token_loss, batch, gather=gather)


class Objective(ABC):
    """What the engine calls with this rank's token losses."""

    @property
    def spans_step(self) -> bool:
        """Whether :meth:`weigh` must see all micro-batches of an optimizer step together."""
        return False

    def __call__(self, token_loss: torch.Tensor, batch: Batch, gather: Gather | None = None) -> WeightedLoss:
        """Return the loss of a batch that is a whole step: ``token_loss`` [b, t] is aligned with its ``labels``."""
        return apply_weights(self.weigh([token_loss], [batch], gather)[0], token_loss)

    def weigh(
        self, token_losses: Sequence[torch.Tensor], batches: Sequence[Batch], gather: Gather | None = None
    ) -> list[TokenWeights]:
        """Return what each token of an optimizer step's micro-batches counts; engines average the parts' losses."""
        return [
            self._weigh_one(losses.detach(), batch, gather) for losses, batch in zip(token_losses, batches, strict=True)
        ]

    @abstractmethod
    def _weigh_one(self, token_loss: torch.Tensor, batch: Batch, gather: Gather | None) -> TokenWeights:
        """Return what each token of one micro-batch counts."""


@dataclass(frozen=True)
class Dual(Objective):
    """:func:`dual_loss` with its settings; with ``scope: local`` each rank ranks and averages its own tokens alone."""

    config: SelectionConfig = field(default_factory=SelectionConfig)

    @property
    def spans_step(self) -> bool:
        """Whether the scope is ``step``."""
        return self.config.scope == "step"

    def weigh(
        self, token_losses: Sequence[torch.Tensor], batches: Sequence[Batch], gather: Gather | None = None
    ) -> list[TokenWeights]:
        """Rank the tokens of all micro-batches together with ``scope: step``, else those of each alone."""
        if self.spans_step:
            return self._weigh(token_losses, batches, gather)
        return super().weigh(token_losses, batches, None if self.config.scope == "local" else gather)

    def _weigh_one(self, token_loss: torch.Tensor, batch: Batch, gather: Gather | None) -> TokenWeights:
        return self._weigh([token_loss], [batch], gather)[0]

    def _weigh(
        self, token_losses: Sequence[torch.Tensor], batches: Sequence[Batch], gather: Gather | None
    ) -> list[TokenWeights]:
        pairs = list(zip(token_losses, batches, strict=True))
        return dual_weights(
            token_losses,
            [batch["reference_loss"].to(losses.device) for losses, batch in pairs],
            [_predicted(losses, batch) for losses, batch in pairs],
            self.config,
            gather=gather,
        )


@dataclass(frozen=True)
class Selective(Dual):
    """:func:`selective_loss`; of the settings only ``hard_share`` and ``scope`` matter."""

    def __post_init__(self) -> None:
        """Take the unlearning half out."""
        object.__setattr__(self, "config", learning_half(self.config))


class CausalLM(Objective):
    """:func:`causal_lm_loss`."""

    def _weigh_one(self, token_loss: torch.Tensor, batch: Batch, gather: Gather | None) -> TokenWeights:
        predicted = _predicted(token_loss, batch)
        return mean_weights(token_loss, predicted, predicted, _reference(token_loss, batch), gather)


@dataclass(frozen=True)
class Goldfish(Objective):
    """:func:`goldfish_loss` with its settings."""

    config: GoldfishConfig = field(default_factory=GoldfishConfig)

    def _weigh_one(self, token_loss: torch.Tensor, batch: Batch, gather: Gather | None) -> TokenWeights:
        kept = goldfish_mask(
            batch["input_ids"],
            batch["position_ids"],
            batch["labels"],
            drop_every=self.config.drop_every,
            context=self.config.context,
        ).to(token_loss.device)
        predicted = full_mask(token_loss, _predicted(token_loss, batch))
        return mean_weights(token_loss, predicted, kept, _reference(token_loss, batch), gather)


def learning_half(selection: SelectionConfig) -> SelectionConfig:
    """Return settings under which nothing is unlearned."""
    return replace(selection, memorized_share=0.0, alpha=0.0, tau=0.0, normalize="per_set")


def build_objective(
    name: ObjectiveName, selection: SelectionConfig | None = None, goldfish: GoldfishConfig | None = None
) -> Objective:
    """Return an objective by its name; settings left out take their defaults.

    Args:
        name: of the objective.
        selection: for ``dual`` and ``selective``; others do not look at it.
        goldfish: for ``goldfish`` alone.

    Raises:
        ValueError: there is no such objective.
    """
    if name not in get_args(ObjectiveName):
        raise ValueError(f"objective: {name!r} is none of {', '.join(get_args(ObjectiveName))}")
    if name == "causal_lm":
        return CausalLM()
    if name == "goldfish":
        return Goldfish(goldfish or GoldfishConfig())
    return (Dual if name == "dual" else Selective)(selection or SelectionConfig())


def _predicted(token_loss: torch.Tensor, batch: Batch) -> torch.Tensor:
    return (batch["labels"] != IGNORED_LABEL).to(token_loss.device)


def _reference(token_loss: torch.Tensor, batch: Batch) -> torch.Tensor | None:
    reference_loss = batch.get("reference_loss")
    return None if reference_loss is None else reference_loss.to(token_loss.device)
