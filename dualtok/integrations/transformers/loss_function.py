"""The dual loss as ``compute_loss_func`` of an unchanged Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dualtok.distributed.ranks import Ranks
from dualtok.errors import ConfigError, DataError
from dualtok.integrations.transformers.collator import REFERENCE_LOSS
from dualtok.integrations.transformers.settings import DualConfig
from dualtok.integrations.transformers.token_losses import TokenLossOutput, aligned_with_predictions
from dualtok.objective.head import IGNORED_LABEL
from dualtok.objective.loss import build_objective
from dualtok.objective.selection import RankGather

if TYPE_CHECKING:
    from collections.abc import Callable


def dual_loss(config: DualConfig | None = None) -> Callable[..., torch.Tensor]:
    """Return the dual loss as ``Trainer(compute_loss_func=...)`` takes it.

    The model must come from :func:`~.token_losses.with_token_losses` and the batches from a
    :class:`~.collator.DualCollator`. Tokens are ranked within a micro-batch, over all ranks. With gradient accumulation
    the loss of an optimizer step is the mean of its micro-batches' dual losses, each weighted by its tokens' share of
    the step's (``num_items_in_batch``); where they have equally many that is dualtok's own mean. It is exact for both
    values of ``average_tokens_across_devices``. Under evaluation the function returns the plain loss.

    Raises:
        ConfigError: ``scope`` is ``step``: this function never sees the micro-batches of a step together.
    """
    config = config or DualConfig()
    if config.scope == "step":
        raise ConfigError("scope: step needs all micro-batches of a step together; use DualTrainer, or another scope")
    objective = build_objective("dual", config)

    def compute_loss(
        outputs: Any, labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        losses, targets, reference = _parts(outputs)
        if not torch.is_grad_enabled():
            return plain_loss(losses, targets, num_items_in_batch)
        if reference is None:
            raise DataError(missing_column())
        if num_items_in_batch is None:
            raise ConfigError(
                "num_items_in_batch: the Trainer did not count the batch's labels; collate with DualCollator"
            )
        ranks = ranks_of_job(losses.device)
        batch = {"labels": targets, REFERENCE_LOSS: aligned_with_predictions(reference, 0.0)}
        outcome = objective(losses, batch, gather=gather_of(ranks))
        # The mean over ranks of `outcome.loss` is the micro-batch's. Either each rank has the count of all of them, and
        # the Trainer multiplies by their number, or each has its own and nothing is multiplied: the sum fits both.
        own = torch.stack([(targets != IGNORED_LABEL).sum(), torch.as_tensor(num_items_in_batch).to(losses.device)])
        tokens, items = ranks.sum(own.double().view(2))
        return outcome.loss * (tokens / items.clamp(min=1)).float()

    return compute_loss


def plain_loss(
    losses_bt: torch.Tensor, labels_bt: torch.Tensor, num_items: torch.Tensor | float | None
) -> torch.Tensor:
    """Return the sum of token losses over the number of items, as transformers' own loss; without it, their mean."""
    if num_items is None:
        num_items = (labels_bt != IGNORED_LABEL).sum().clamp(min=1)
    return losses_bt.float().sum() / num_items


def ranks_of_job(device: torch.device) -> Ranks:
    """Return the ranks of the process group that accelerate has joined, or one alone."""
    if not dist.is_initialized():
        return Ranks(0, 1, device)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def gather_of(ranks: Ranks) -> RankGather | None:
    """Return what brings the scores of all ranks together; None where there is one alone."""
    return RankGather(ranks.gather, ranks.world_size) if ranks.world_size > 1 else None


def missing_column() -> str:
    """Return what to do about batches without reference losses."""
    return (
        f"{REFERENCE_LOSS}: the batches do not have it. Run score_dataset on the training data and collate with "
        "DualCollator; if the dataset has the column, the Trainer has removed it: give the Trainer "
        "with_token_losses(model), or set remove_unused_columns=False"
    )


def _parts(outputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    if not (isinstance(outputs, dict) and "token_losses" in outputs):
        raise ConfigError(
            "the model returned no token losses: give the Trainer with_token_losses(model), and collate with "
            "DualCollator"
        )
    found = TokenLossOutput(**outputs)
    assert found.token_losses is not None
    assert found.shift_labels is not None
    return found.token_losses, found.shift_labels, found.reference_loss
