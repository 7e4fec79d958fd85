"""A model together with the objective that it is trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualtok.model.losses import TokenLossModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from dualtok.model.losses import Batch
    from dualtok.objective.loss import DualLoss, Objective
    from dualtok.objective.selection import Gather


class ObjectiveModel(TokenLossModel):
    """A model whose forward gives the training objective's scalar loss in training mode, token losses otherwise."""

    def __init__(
        self, causal_lm: PreTrainedModel, objective: Objective, gather: Gather | None, chunk_tokens: int | None
    ) -> None:
        super().__init__(causal_lm, chunk_tokens)
        self._objective = objective
        self._gather = gather
        self.outcome: DualLoss | None = None

    def compute(self, batch: Batch) -> torch.Tensor:
        """Return the scalar loss (training) or token losses [b, t] (evaluation).

        The selection is left in ``outcome`` and not returned: ZeRO-3's hooks only understand tensors.
        """
        token_loss: torch.Tensor = super().compute(batch)
        if not self.training:
            return token_loss
        self.outcome = self._objective(token_loss, batch, gather=self._gather)
        return self.outcome.loss
