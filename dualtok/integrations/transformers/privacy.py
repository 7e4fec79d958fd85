"""Membership figures at each evaluation of any Trainer, whatever it trains with.

Only the Ref attack with the stored reference losses, and the gap between losses: they show where training is going.
What a model gives away is for an audit to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from dualtok.audit.statistics.metrics import roc_auc
from dualtok.errors import DataError
from dualtok.integrations.transformers.collator import REFERENCE_LOSS, DualCollator
from dualtok.integrations.transformers.loss_function import ranks_of_job
from dualtok.integrations.transformers.token_losses import aligned_with_predictions, with_token_losses
from dualtok.objective.head import IGNORED_LABEL
from dualtok.train.evaluation import Evaluation
from dualtok.train.reporter import evaluation_scalars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualtok.distributed.ranks import Ranks


class PrivacyCallback(TrainerCallback):
    """Measures at each evaluation how members of the training data differ from other documents.

    Logs the scalars ``evaluation/...`` of dualtok's own loop: the plain loss on both sets, ``member_gap`` and, where
    both sets have ``reference_loss``, ``ref_auc``. The evaluation's metrics get ``eval_member_gap`` and
    ``eval_ref_auc``, so that ``metric_for_best_model="ref_auc"`` works. The ranks share the documents.

    Args:
        trainer: the Trainer that it is added to (``trainer.add_callback(PrivacyCallback(trainer, ...))``), with any
            loss; its model is changed by :func:`~.token_losses.with_token_losses`.
        members: examples of the training data, one document each, with ``input_ids`` and perhaps ``reference_loss``.
        non_members: as many documents of the same kind that are trained on nowhere.
        batch_size: documents per rank and forward pass.

    Raises:
        DataError: a set is empty.
    """

    def __init__(self, trainer: Any, members: Sequence[Any], non_members: Sequence[Any], batch_size: int = 8) -> None:
        for name, examples in (("members", members), ("non_members", non_members)):
            if len(examples) == 0:
                raise DataError(f"{name}: no documents; give some dozens at least")
        self._trainer, self._members, self._non_members, self._rows = trainer, members, non_members, batch_size
        padding = getattr(trainer.processing_class, "pad_token_id", None)
        self._collate = DualCollator(pad_token_id=0 if padding is None else padding)
        with_token_losses(trainer.accelerator.unwrap_model(trainer.model), getattr(trainer, "dual", None))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, and add the figures to the log and to the evaluation's metrics."""
        evaluation = self.measure()
        self._trainer.log({name: value for name, value in evaluation_scalars(evaluation).items() if value is not None})
        metrics: dict[str, float] = kwargs["metrics"]
        metrics["eval_member_gap"] = evaluation.gap
        if evaluation.ref_auc is not None:
            metrics["eval_ref_auc"] = evaluation.ref_auc

    def measure(self) -> Evaluation:
        """Return the figures of the model as it is; every rank must call it, and gets the same."""
        seen, unseen = self._sums(self._members), self._sums(self._non_members)
        member_loss, loss = (float(sums[:, 0].sum() / sums[:, 2].sum()) for sums in (seen, unseen))
        calibrated = [(sums[:, 0] - sums[:, 1]) / sums[:, 2] for sums in (seen, unseen)]
        known = all(bool(values.isfinite().all()) for values in calibrated)
        auc = float(roc_auc(-calibrated[0].numpy(), -calibrated[1].numpy())) if known else None
        return Evaluation(self._trainer.state.global_step, loss, member_loss, auc)

    def _sums(self, examples: Sequence[Any]) -> torch.Tensor:
        """Return loss, reference loss (NaN if unknown) and tokens of each document, [documents, 3] float64."""
        trainer = self._trainer
        ranks: Ranks = ranks_of_job(trainer.accelerator.device)
        sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        model = trainer.model_wrapped if sharded else trainer.model
        was_training = model.training
        model.eval()
        mine = []
        with torch.no_grad():
            # Every rank makes equally many passes: where weights are sharded each one is a collective.
            for first in range(0, len(examples), self._rows * ranks.world_size):
                start = first + ranks.rank * self._rows
                rows = [examples[index] for index in range(start, min(start + self._rows, len(examples)))]
                sums = self._batch_sums(model, rows or [examples[0]])
                mine += sums.tolist() if rows else []
        model.train(was_training)
        # In the order of the documents, so that sums do not depend on the number of ranks.
        everyone = ranks.gather_objects(mine)
        chunks = [[part[at : at + self._rows] for part in everyone] for at in range(0, len(everyone[0]), self._rows)]
        found = torch.tensor([row for chunk in chunks for part in chunk for row in part], dtype=torch.float64)
        return found[found[:, 2] > 0]

    def _batch_sums(self, model: Any, rows: list[Any]) -> torch.Tensor:
        columns = ("input_ids", "labels", "attention_mask", REFERENCE_LOSS)
        batch = self._collate([{name: row[name] for name in columns if row.get(name) is not None} for row in rows])
        device = self._trainer.accelerator.device
        labels = batch["shift_labels"].to(device)
        with self._trainer.compute_loss_context_manager():
            losses = model(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                shift_labels=labels,
            )["token_losses"]
        predicted = (labels != IGNORED_LABEL).cpu().double()
        reference = batch.get(REFERENCE_LOSS)
        known = torch.nan if reference is None else aligned_with_predictions(reference, 0.0).double()
        return torch.stack([losses.cpu().double().sum(1), (known * predicted).sum(1), predicted.sum(1)], dim=1)
