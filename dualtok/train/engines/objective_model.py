"""A model together with the objective that it is trained with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dualtok.model.losses import TokenLossModel
from dualtok.objective.chunked_cross_entropy import IGNORED_LABEL
from dualtok.objective.loss import Dual
from dualtok.objective.token_weights import apply_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dualtok.model.losses import Batch
    from dualtok.objective.loss import Objective
    from dualtok.objective.selection import Gather
    from dualtok.objective.token_weights import TokenWeights, WeightedLoss
    from dualtok.train.guard import LossLimit


class ObjectiveModel(TokenLossModel):
    """A model whose forward gives the training objective's scalar loss in training mode, token losses otherwise."""

    def __init__(self, causal_lm: PreTrainedModel, objective: Objective, gather: Gather | None, **head: Any) -> None:
        super().__init__(causal_lm, **head)
        self.objective = objective
        self.gather = gather
        self.scoring = False
        """Whether token losses are wanted in training mode too."""
        self.weights: TokenWeights | None = None
        """Of the tokens of the next micro-batch, where they were decided beforehand."""
        self.outcome: WeightedLoss | None = None
        self.limit: LossLimit | None = None
        """Looks for spikes, if the run asks for it."""

    def scale_alpha(self, scale: float) -> None:
        """Unlearn with this share of the alpha that the objective has now."""
        if isinstance(self.objective, Dual):
            settings = self.objective.config
            self.objective = Dual(replace(settings, alpha=settings.alpha * scale))

    def compute(self, batch: Batch) -> torch.Tensor:
        """Return the scalar loss (training) or token losses [b, t] (evaluation, scoring).

        The selection is left in ``outcome`` and not returned: ZeRO-3's hooks only understand tensors.
        """
        if self.scoring or not self.training:
            return super().compute(batch)
        weights, self.weights = self.weights, None
        if weights is None:
            self.outcome = self.objective(super().compute(batch), batch, gather=self.gather)
        else:
            # Tokens that are known to play no part need no logits.
            labels = torch.where(weights.factors != 0, batch["labels"], IGNORED_LABEL)
            self.outcome = apply_weights(weights, super().compute({**batch, "labels": labels}))
        loss = self.outcome.loss
        return loss if self.limit is None else loss * self.limit.factor(self.outcome)
