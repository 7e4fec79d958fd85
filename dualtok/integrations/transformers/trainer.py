"""A Trainer that trains with the dual loss, and the mixin that it is made of.

Legend: b batch, t position.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from dualtok.errors import ConfigError, DataError
from dualtok.integrations.transformers.collator import REFERENCE_LOSS, DualCollator
from dualtok.integrations.transformers.loss_function import gather_of, missing_column, plain_loss, ranks_of_job
from dualtok.integrations.transformers.settings import DualConfig
from dualtok.integrations.transformers.token_losses import (
    NO_FEATURES,
    aligned_with_predictions,
    causal_lm_of,
    with_token_losses,
)
from dualtok.model.losses import require_faithful
from dualtok.objective.head import IGNORED_LABEL
from dualtok.objective.loss import build_objective
from dualtok.objective.token_weights import apply_weights
from dualtok.train.engines.zero import same_random_numbers
from dualtok.train.metrics import StepTotals, peak_memory_gib, step_metrics
from dualtok.train.reporter import step_scalars

if TYPE_CHECKING:
    from dualtok.distributed.ranks import Ranks
    from dualtok.objective.token_weights import TokenWeights

NOT_THE_TRAINERS = ("data/skipped_blocks", "throughput/tokens_per_second")
"""Figures of dualtok's own loop that nothing here measures."""


class DualMixin:
    """Turns a Trainer into one that trains with the dual loss: ``class Mine(DualMixin, SomeTrainer)``.

    Args:
        model: as for the Trainer; a ``PreTrainedModel`` or ``PeftModel``, changed by
            :func:`~.token_losses.with_token_losses`.
        args: as for the Trainer.
        data_collator: None takes a :class:`~.collator.DualCollator` with the tokenizer's padding. Another one must
            keep ``reference_loss`` aligned with ``input_ids``.
        train_dataset: has a column ``reference_loss`` (:func:`~.scoring.score_dataset`).
        eval_dataset: needs none; evaluation reports the plain loss.
        dual: settings of the loss.
        kwargs: as for the Trainer.

    Raises:
        ConfigError: the arguments ask for what the dual loss cannot do here.
        DataError: the training data have no reference losses.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        dual: DualConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self.dual = dual or DualConfig()
        self._objective = build_objective("dual", self.dual)
        self._window: list[Any] = []
        self._weights: list[TokenWeights] = []
        self._checked = False
        if kwargs.get("compute_loss_func") is not None:
            raise ConfigError(
                "compute_loss_func: would have no effect here; use a plain Trainer with it, or leave it out"
            )
        if args is not None:
            require_supported(args)
        if data_collator is None:
            padding = getattr(kwargs.get("processing_class"), "pad_token_id", None)
            data_collator = DualCollator(pad_token_id=0 if padding is None else padding)
        trainer: Any = self
        parent: Any = super()
        parent.__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        require_supported_layout(trainer)
        columns = getattr(trainer.train_dataset, "column_names", None)
        if columns is not None and REFERENCE_LOSS not in columns:
            raise DataError(
                f"train_dataset: no column {REFERENCE_LOSS}; make it with score_dataset(reference, dataset)"
            )
        with_token_losses(trainer.model, self.dual)
        # The loss is that of one micro-batch, so the Trainer has to divide it by their number. It also multiplies what
        # it believes to be a sum over all ranks' tokens.
        self.model_accepts_loss_kwargs = False
        self._begin_totals()

    @property
    def _ranks(self) -> Ranks:
        trainer: Any = self
        return ranks_of_job(trainer.accelerator.device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; what an earlier call has not logged is forgotten."""
        parent: Any = super()
        self._begin_totals()
        return parent.train(*args, **kwargs)

    def call_model_init(self, trial: Any = None) -> Any:
        """Return a new model that gives token losses."""
        trainer: Any = super()
        return with_token_losses(trainer.call_model_init(trial), self.dual)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the loss needs, whatever the model's forward takes."""
        parent: Any = super()
        parent._set_signature_columns_if_needed()
        wanted = (REFERENCE_LOSS, "position_ids", "attention_mask", "labels")
        trainer: Any = self
        trainer._signature_columns += [name for name in wanted if name not in trainer._signature_columns]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Keep the reference losses in float32: for DeepSpeed the Trainer would round them to the model's precision."""
        trainer: Any = super()
        reference = inputs.get(REFERENCE_LOSS)
        prepared: dict[str, Any] = trainer._prepare_inputs({k: v for k, v in inputs.items() if k != REFERENCE_LOSS})
        if reference is not None:
            prepared[REFERENCE_LOSS] = reference.to(prepared["input_ids"].device, torch.float32)
        return prepared

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of an optimizer step; a loss of ``scope: step`` needs them together."""
        trainer: Any = super()
        batches, items = trainer.get_batch_samples(*args, **kwargs)
        self._window, self._weights = (batches, []) if self._objective.spans_step and len(batches) > 1 else ([], [])
        return batches, items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the dual loss of one micro-batch over all ranks in training, and the plain loss otherwise.

        Raises:
            ConfigError: the model computes something else than dualtok's head would train on.
            DataError: the batch has no reference losses or labels.
        """
        if not model.training:
            parent: Any = super()
            plain = {name: value for name, value in inputs.items() if name not in (REFERENCE_LOSS, "shift_labels")}
            return parent.compute_loss(model, plain, return_outputs=return_outputs)
        batch = _objective_batch(inputs)
        if not self._checked:
            self._check_model(model, inputs)
        weights = self._next_weights(model)
        if weights is None:
            outcome = self._objective(_token_losses(model, inputs, batch), batch, gather=gather_of(self._ranks))
        else:
            # Tokens that are known to play no part need no logits.
            labels = torch.where(weights.factors != 0, batch["labels"], IGNORED_LABEL)
            outcome = apply_weights(weights, _token_losses(model, inputs, {"labels": labels}))
        self._totals.add(outcome)
        self._micro_batches += 1
        return (outcome.loss, {}) if return_outputs else outcome.loss

    def _next_weights(self, model: Any) -> TokenWeights | None:
        """Return how the tokens of the next micro-batch of a step count, where all are weighed together."""
        trainer: Any = self
        if not self._weights:
            if not self._window:
                return None
            window, self._window = self._window, []
            with same_random_numbers(trainer.accelerator.device), torch.no_grad():
                prepared = [self._prepare_inputs(inputs) for inputs in window]
                batches = [_objective_batch(inputs) for inputs in prepared]
                losses = [_token_losses(model, *pair) for pair in zip(prepared, batches, strict=True)]
            self._weights = self._objective.weigh(losses, batches, gather_of(self._ranks))
        return self._weights.pop(0)

    def _check_model(self, model: Any, inputs: dict[str, Any]) -> None:
        """Compare the token losses with the model's own logits, once; all ranks refuse alike."""
        trainer: Any = self
        packed = inputs.get("position_ids") is not None and inputs.get("attention_mask") is None
        model.eval()
        with torch.no_grad():
            errors = model(input_ids=inputs["input_ids"], check_packed=packed).token_losses
        model.train()
        causal_lm = causal_lm_of(trainer.accelerator.unwrap_model(model))
        rounds = trainer.args.bf16 or next(causal_lm.parameters()).dtype == torch.bfloat16
        self._ranks.together(lambda: require_faithful(errors, "bf16" if rounds else "fp32", type(causal_lm).__name__))
        self._checked = True

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Return the plain loss without the logits of all tokens, where nobody asks for them.

        It is the Trainer's own evaluation loss: the mean over all ranks' predicted tokens.
        """
        trainer: Any = self
        if not prediction_loss_only or inputs.get("labels") is None:
            parent: Any = super()
            result: tuple[Any, Any, Any] = parent.prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return result
        inputs = self._prepare_inputs(inputs)
        labels = _shifted_labels(inputs)
        with trainer.compute_loss_context_manager():
            losses = _token_losses(model, inputs, {"labels": labels})
        ranks = self._ranks
        tokens = ranks.sum((labels != IGNORED_LABEL).sum().double().view(1)) / ranks.world_size
        return plain_loss(losses, labels, tokens.clamp(min=1e-9)).float().mean(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the loss's parts as well, under the names of dualtok's own loop: means since the last entry."""
        trainer: Any = self
        if "loss" in logs and self._micro_batches:
            ranks = self._ranks
            total = self._totals.reduce(ranks, losses=self._micro_batches * ranks.world_size)
            metrics = step_metrics(
                total,
                step=trainer.state.global_step,
                left_out=None,
                gradient_norm=float(logs.get("grad_norm", math.nan)),
                learning_rate=float(logs.get("learning_rate", math.nan)),
                skipped_blocks=0,
                tokens_per_second=math.nan,
                peak_memory_gib=peak_memory_gib(ranks.device),
            )
            scalars = step_scalars(metrics, "dual").items()
            known = {k: v for k, v in scalars if v is not None and not math.isnan(v) and k not in NOT_THE_TRAINERS}
            logs = {**logs, **known}
            self._begin_totals()
        parent: Any = super()
        parent.log(logs, *args, **kwargs)

    def _begin_totals(self) -> None:
        trainer: Any = self
        self._totals, self._micro_batches = StepTotals(trainer.accelerator.device), 0


class DualTrainer(DualMixin, Trainer):
    """``transformers.Trainer`` with the dual loss; arguments as for :class:`DualMixin`."""


def require_supported(args: Any) -> None:
    """Raise ConfigError where a Trainer's arguments ask for what the dual loss cannot do."""
    _refuse(
        {
            "label_smoothing_factor: the dual loss has no smoothed form; set it to 0": args.label_smoothing_factor != 0,
            "fp16: gradient ascent on memorized tokens drives its loss scale down; use bf16": args.fp16,
            # Settings of TRL's.
            "packing, padding_free: rows would hold several documents without a mark that the collator knows; use "
            "DualCollator(pack_to=...)": getattr(args, "packing", False) or getattr(args, "padding_free", False),
            "loss_type: dft would have no effect here; use nll": getattr(args, "loss_type", "nll") == "dft",
        }
    )


def require_supported_layout(trainer: Any) -> None:
    """Raise ConfigError where ranks, or devices of one process, share what is to be ranked."""
    sizes = (trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size())
    _refuse(
        {
            "several devices in one process: tokens would be ranked on each alone; start one process per device with "
            "torchrun or accelerate launch": trainer.args.n_gpu > 1,
            "tensor, context and sequence parallelism: ranks would share tokens that are ranked once each; use "
            "DeepSpeed or FSDP": any(size > 1 for size in sizes),
        }
    )


def _refuse(reasons: dict[str, bool]) -> None:
    for reason, asked in reasons.items():
        if asked:
            raise ConfigError(reason)


def _objective_batch(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return labels and reference losses [b, t], each at the position that predicts its token.

    Raises:
        DataError: the batch has none.
    """
    if inputs.get("labels") is None and inputs.get("shift_labels") is None:
        raise DataError("labels: the batches do not have them; collate with DualCollator")
    if (reference := inputs.get(REFERENCE_LOSS)) is None:
        raise DataError(missing_column())
    labels = _shifted_labels(inputs)
    if reference.shape != labels.shape:
        raise DataError(
            f"{REFERENCE_LOSS}: has shape {tuple(reference.shape)}, the labels {tuple(labels.shape)}; collate with "
            "DualCollator"
        )
    return {"labels": labels, REFERENCE_LOSS: aligned_with_predictions(reference, 0.0)}


def _shifted_labels(inputs: dict[str, Any]) -> torch.Tensor:
    shifted: torch.Tensor | None = inputs.get("shift_labels")
    return aligned_with_predictions(inputs["labels"], IGNORED_LABEL) if shifted is None else shifted


def _token_losses(model: Any, inputs: dict[str, Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the token losses [b, t] of a model in all its wrapping."""
    left_out = (*NO_FEATURES, REFERENCE_LOSS, "shift_labels")
    features = {name: value for name, value in inputs.items() if name not in left_out}
    losses: torch.Tensor = model(**features, shift_labels=batch["labels"])["token_losses"]
    return losses
