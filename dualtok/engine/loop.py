"""The training loop: batches in; steps, evaluations, checkpoints and events out. The same for every engine."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dualtok.engine import checkpoint
from dualtok.engine.evaluation import Evaluation, evaluate
from dualtok.engine.metrics import History, StepMetrics, StepTotals, peak_memory_gib, step_metrics
from dualtok.errors import CheckpointError, DualtokError
from dualtok.monitor.events import EventWriter, fixed_bins
from dualtok.monitor.progress import RunProgress
from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dualtok.data.mixture import TrainingStream
    from dualtok.engine.config import TrainConfig
    from dualtok.engine.protocol import TrainingEngine
    from dualtok.model.losses import Batch
    from dualtok.reference.live import LiveReference
    from dualtok.run import RunConfig


CHECKPOINT_EVERY = 500
"""Optimiser steps between checkpoints of a run that asks for neither checkpoints nor evaluations on the way."""


@dataclass
class LoopState:
    """Where a run stands; independent of rank and world size, so that it can be resumed."""

    step: int = 0
    samples_seen: int = 0
    """Blocks drawn from the stream: the whole data cursor."""
    best_loss: float = math.inf
    """Smallest validation loss so far, nats."""
    best_step: int = 0
    blocks: str = ""
    """Digest of the prepared data."""


@dataclass
class TrainingLoop:
    """Trains one model to the end of its schedule.

    Args:
        run: the run's settings; its ``train`` section is set.
        engine: the model in its DeepSpeed engine.
        stream: blocks of the training split, with reference losses if the run has stored ones.
        validation: blocks of ``validation``.
        total_steps: optimiser steps of the whole run.
        state: where the run stands.
        reference: computes the reference losses while training, if they are not stored.
    """

    run: RunConfig
    engine: TrainingEngine
    stream: TrainingStream
    validation: TrainingStream
    total_steps: int
    state: LoopState = field(default_factory=LoopState)
    reference: LiveReference | None = None

    def __post_init__(self) -> None:
        """Name the parts that every method uses."""
        assert self.run.train is not None
        self.train: TrainConfig = self.run.train
        self.layout = self.engine.layout
        self.ranks = self.layout.ranks
        self.folder = Path(self.run.output_dir)
        self.checkpoints = self.folder / "checkpoints"

    def resume(self, saved: checkpoint.SavedCheckpoint) -> None:
        """Continue from a complete checkpoint."""
        state = LoopState(**checkpoint.load_checkpoint(self.engine, saved))
        if state.blocks != self.state.blocks:
            raise CheckpointError(
                f"{saved.folder}: trained on other blocks than {self.run.data.dir} (or a folder of data.mix) holds now; "
                "restore them"
            )
        self.state = state

    def fit(self) -> LoopState:
        """Train until the last step.

        Raises:
            DualtokError: the loss is not finite any more.
        """
        first = self.ranks.is_first
        metrics = History(self.folder / "metrics.jsonl" if first else None, self.state.step)
        evaluations = History(self.folder / "evaluations.jsonl" if first else None, self.state.step)
        writes_events = first and self.run.monitor.tensorboard
        events = EventWriter(self.folder / "events" if writes_events else None, self.state.step + 1)
        events.text("run", self.run.to_yaml(), self.state.step)
        batches = self.batches()
        progress = RunProgress(
            f"train {self.run.objective}", self.total_steps, active=first, plain_every=self.run.monitor.log_every,
            start=self.state.step,
        )  # fmt: skip
        with progress:
            while self.state.step < self.total_steps:
                outcome = self.step(batches, events)
                metrics.append(outcome)
                progress.advance(1, f"loss {outcome.loss:.4f} {outcome.tokens_per_second:,.0f} tokens/s")
                if self.state.step % self.run.monitor.log_every == 0 or self.state.step == self.total_steps:
                    events.scalars(step_scalars(outcome, self.run.objective), outcome.step)
                evaluation = self._evaluate_when_due()
                if evaluation is not None:
                    evaluations.append(evaluation)
                    events.scalars(evaluation_scalars(evaluation), evaluation.step)
                    events.flush()
                    progress.note(_describe(evaluation))
                self._save_when_due(evaluation)
        events.close()
        return self.state

    def batches(self) -> Iterator[Batch]:
        """Return this replica's micro-batches from where the run stands, with their reference losses."""
        batches = self.stream_batches()
        if self.reference is None:
            return batches
        # It may read ahead: the data cursor counts what was trained on, not what was read.
        return self.reference.scored(batches, self.train.gradient_accumulation)

    def stream_batches(self) -> Iterator[Batch]:
        """Return this replica's micro-batches as the stream has them; its stages read the same ones."""
        return iter(
            self.stream.batches(
                start_sample=self.state.samples_seen,
                global_micro_batch=self.train.batch_size // self.train.gradient_accumulation,
                rank=self.layout.data_parallel.rank,
                world_size=self.layout.data_parallel.world_size,
                workers=self.train.data_workers,
            )
        )

    def step(self, batches: Iterator[Batch], events: EventWriter) -> StepMetrics:
        """Run one optimiser step and measure it.

        Raises:
            DualtokError: the loss is not finite. Every rank raises it, as all see the same sum.
        """
        started = time.perf_counter()
        step = self.state.step + 1
        self._seed_dropout(step)
        learning_rate = self.engine.learning_rate()
        totals = StepTotals(self.ranks.device)
        histogram = self.run.monitor.histogram_every
        window = [next(batches) for _ in range(self.train.gradient_accumulation)]
        outcomes = self.engine.train_step(window)
        for outcome in outcomes:
            totals.add(outcome)
        total = totals.reduce(self.ranks, losses=self.layout.data_parallel.world_size * len(window))
        if histogram and step % histogram == 0 and "reference_loss" in window[0]:
            bins = fixed_bins(torch.zeros(0))  # what a stage without a loss adds
            for outcome, batch in zip(outcomes, window, strict=False):
                bins += fixed_bins(outcome.calibrated.cpu()[batch["labels"] != IGNORED_LABEL])
            events.histogram("calibrated/s", self.ranks.sum(bins.to(self.ranks.device)).cpu().numpy(), step)
        norm = self.engine.gradient_norm()
        # A NaN token is left out of the selection, so the plain loss must be looked at too; and DeepSpeed skips a step
        # with a gradient that is not finite without a word.
        if self.engine.skipped_steps() or not math.isfinite(total["loss"] + total["plain_sum"] + norm):
            raise DualtokError(
                f"step {step}: training diverged (loss {total['loss']}, sum of plain losses {total['plain_sum']}, "
                f"gradient norm {norm}); lower train.learning_rate or selection.alpha and resume from the last "
                f"checkpoint in {self.checkpoints}"
            )
        self.state.step = step
        self.state.samples_seen += self.train.batch_size
        seconds = time.perf_counter() - started
        return step_metrics(
            total, step=step, gradient_norm=norm, learning_rate=learning_rate,
            tokens_per_second=total["plain_count"] / seconds, peak_memory_gib=peak_memory_gib(self.ranks.device),
        )  # fmt: skip

    def _seed_dropout(self, step: int) -> None:
        """Make random numbers a function of (seed, step, rank), so that a resumed run draws the same ones."""
        torch.manual_seed(((self.run.seed * 1_000_003 + step) * 65_537 + self.ranks.rank) % 2**63)

    def _evaluate_when_due(self) -> Evaluation | None:
        every, step = self.train.evaluate_every, self.state.step
        if step != self.total_steps and not (every and step % every == 0):
            return None
        rows = max(1, self.train.batch_size // self.train.gradient_accumulation // self.layout.data_parallel.world_size)
        evaluation = evaluate(
            self.engine, self.stream, self.validation, blocks=self.train.evaluation_blocks, batch_size=rows, step=step,
            reference=self.reference,
        )  # fmt: skip
        if not math.isfinite(evaluation.validation_loss):  # before a checkpoint of such weights replaces a good one
            raise DualtokError(
                f"step {step}: the validation loss is {evaluation.validation_loss}, training diverged; lower "
                f"train.learning_rate or selection.alpha and resume from the last checkpoint in {self.checkpoints}"
            )
        return evaluation

    def _save_when_due(self, evaluation: Evaluation | None) -> None:
        every, step = self.train.checkpoint_every, self.state.step
        improved = evaluation is not None and evaluation.validation_loss < self.state.best_loss
        if improved and evaluation is not None:
            self.state.best_loss, self.state.best_step = evaluation.validation_loss, step
        if every is None and self.train.evaluate_every is None:
            every = CHECKPOINT_EVERY
        due = step % every == 0 if every else evaluation is not None
        if not (due or improved or step == self.total_steps):
            return
        tag = checkpoint.save_checkpoint(self.engine, self.checkpoints, step, asdict(self.state))
        self.ranks.first_does(lambda: self._point(tag, improved=improved))

    def _point(self, tag: str, *, improved: bool) -> None:
        if improved:
            checkpoint.point(self.checkpoints, "best", tag)
        checkpoint.point(self.checkpoints, "latest", tag)
        checkpoint.prune(self.checkpoints)


def step_scalars(metrics: StepMetrics, objective: str) -> dict[str, float | None]:
    """Return a step's TensorBoard scalars under their names; ``loss/dual`` is the loss of the objective ``dual``."""
    return {
        f"loss/{objective}": metrics.loss,
        "loss/hard": metrics.hard_loss,
        "loss/memorised": metrics.memorised_loss,
        "loss/plain": metrics.plain_loss,
        **{f"share/{name}": share for name, share in metrics.shares.items()},
        "optimiser/learning_rate": metrics.learning_rate,
        "optimiser/gradient_norm": metrics.gradient_norm,
        "throughput/tokens_per_second": metrics.tokens_per_second,
        "memory/peak_gib": metrics.peak_memory_gib,
    }


def evaluation_scalars(evaluation: Evaluation) -> dict[str, float | None]:
    """Return an evaluation's TensorBoard scalars under their names."""
    return {
        "evaluation/validation_loss": evaluation.validation_loss,
        "evaluation/validation_perplexity": evaluation.perplexity,
        "evaluation/member_loss": evaluation.member_loss,
        "evaluation/member_gap": evaluation.gap,
        "evaluation/ref_auc": evaluation.ref_auc,
    }


def _describe(evaluation: Evaluation) -> str:
    auc = "" if evaluation.ref_auc is None else f", Ref AUC {evaluation.ref_auc:.3f}"
    return (
        f"step {evaluation.step}: validation perplexity {evaluation.perplexity:.2f}, "
        f"member/validation gap {evaluation.gap:.3f} nats{auc}"
    )
