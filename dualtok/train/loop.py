"""The training loop: batches in; steps, evaluations and checkpoints out. The same for every engine."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dualtok.distributed.collectives import timed_collectives
from dualtok.distributed.preemption import PreemptionNotice
from dualtok.errors import CheckpointError, DualtokError, Preempted
from dualtok.monitor.timing import DATA, REFERENCE
from dualtok.train.checkpoints.writer import CheckpointWriter, find_checkpoint, load_checkpoint
from dualtok.train.evaluation import Evaluation, evaluate
from dualtok.train.guard import Guard, LossLimit
from dualtok.train.metrics import StepTotals, peak_memory_gib, step_metrics
from dualtok.train.reporter import Reporter, open_reporter
from dualtok.train.watch import RunWatch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dualtok.config.run import RunConfig
    from dualtok.config.train import GuardAction, TrainConfig
    from dualtok.data.stream.mixture import TrainingStream
    from dualtok.distributed.watchdog import Watchdog
    from dualtok.model.losses import Batch
    from dualtok.monitor.ranks import Efficiency
    from dualtok.reference.live import LiveReference
    from dualtok.train.checkpoints.writer import SavedCheckpoint
    from dualtok.train.engines.base import TrainingEngine
    from dualtok.train.history import StepMetrics


CHECKPOINT_EVERY = 500
"""Optimizer steps between checkpoints of a run that asks for neither checkpoints nor evaluations on the way."""


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
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guard against divergence remembers."""


@dataclass
class TrainingLoop:
    """Trains one model to the end of its schedule.

    Args:
        run: the run's settings; its ``train`` section is set.
        engine: the model in its DeepSpeed engine.
        stream: blocks of the training split, with reference losses if the run has stored ones.
        validation: blocks of ``validation``.
        total_steps: optimizer steps of the whole run.
        state: where the run stands.
        reference: computes the reference losses while training, if they are not stored.
        watchdog: is told of progress.
        efficiency: FLOPs and peak used to compute the model FLOPs utilization (MFU).
        notice: takes note of signals to end while the loop runs; the caller leaves it.
    """

    run: RunConfig
    engine: TrainingEngine
    stream: TrainingStream
    validation: TrainingStream
    total_steps: int
    state: LoopState = field(default_factory=LoopState)
    reference: LiveReference | None = None
    watchdog: Watchdog | None = None
    efficiency: Efficiency | None = None
    notice: PreemptionNotice = field(default_factory=PreemptionNotice)

    def __post_init__(self) -> None:
        """Name the parts that every method uses."""
        assert self.run.train is not None
        self.train: TrainConfig = self.run.train
        self.layout = self.engine.layout
        self.ranks = self.layout.ranks
        self.folder = Path(self.run.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.guard = Guard(self.train.guard)
        if self.train.guard.spike_factor is not None:
            self.engine.model.limit = LossLimit(self.layout.data_parallel)
        self.writer = CheckpointWriter(
            self.checkpoints,
            self.run.as_dict(),
            keep=self.train.checkpoint_keep,
            background=self.train.checkpoint_in_background,
        )
        self.watch = RunWatch(self.engine.timer, self.layout)
        self.reporter = Reporter()
        self._asked_to_end = False

    def resume(self, saved: SavedCheckpoint) -> None:
        """Continue from a complete checkpoint, which any layout may have written."""
        state = LoopState(**load_checkpoint(self.engine, saved))
        if state.blocks != self.state.blocks:
            raise CheckpointError(
                f"{saved.folder}: trained on other blocks than {self.run.data.dir} (or a folder of data.mix) holds "
                "now; restore them"
            )
        before = self.guard.alpha_scale
        if state.guard:
            self.guard.restore(state.guard)
        self.engine.model.scale_alpha(self.guard.alpha_scale / before)
        self.state = state

    def fit(self) -> LoopState:
        """Train until the last step.

        Raises:
            DualtokError: training diverged, and the guard does not go on.
            Preempted: the job was asked to end; a checkpoint of the last step is complete.
        """
        # A signal to end that comes while files are opened or the last checkpoint is written must not interrupt that.
        self.notice.listen()
        with timed_collectives(self.engine.timer):
            self.reporter = open_reporter(
                self.run,
                folder=self.folder,
                ranks=self.ranks,
                watch=self.watch,
                done=self.state.step,
                total_steps=self.total_steps,
                watchdog=self.watchdog,
                efficiency=self.efficiency,
            )
            with self.reporter:
                self._fit()
            self.writer.wait()
            self.reporter.close()
        return self.state

    def _fit(self) -> None:
        batches = self.batches()
        while self.state.step < self.total_steps:
            metrics = self.step(batches)
            self.writer.check()
            if metrics.left_out is not None and self._handle_bad_step(metrics) == "roll_back":
                continue
            self.reporter.step(metrics)
            evaluation = self._evaluate_when_due()
            self._save_when_due(evaluation)
            self._end_when_asked()

    def batches(self) -> Iterator[Batch]:
        """Return this replica's micro-batches from where the run stands, with their reference losses."""
        batches = self.stream_batches()
        if self.reference is None:
            return batches
        # It may read ahead: the data cursor counts what was trained on, not what was read.
        return self.engine.timer.each(REFERENCE, self.reference.scored(batches, self.train.gradient_accumulation))

    def stream_batches(self) -> Iterator[Batch]:
        """Return this replica's micro-batches as the stream has them; its stages read the same ones."""
        batches = self.stream.batches(
            start_sample=self.state.samples_seen,
            global_micro_batch=self.train.batch_size // self.train.gradient_accumulation,
            rank=self.layout.data_parallel.rank,
            world_size=self.layout.data_parallel.world_size,
            workers=self.train.data_workers,
        )
        return self.engine.timer.each(DATA, self.watch.follow(batches))

    def step(self, batches: Iterator[Batch]) -> StepMetrics:
        """Run one optimizer step and measure it; ``left_out`` says whether it was a bad one, alike on every rank."""
        self.reporter.doing(f"in step {self.state.step + 1}")
        with self.engine.timer.step():
            metrics = self._step(batches)
        self.reporter.doing(f"after step {metrics.step}")
        return metrics

    def _step(self, batches: Iterator[Batch]) -> StepMetrics:
        started = time.perf_counter()
        step = self.state.step + 1
        self._seed_dropout(step)
        learning_rate, skipped, limit = self.engine.learning_rate(), self.engine.skipped_steps(), self.guard.limit()

        # The window: this replica's micro-batches of one optimizer step.
        window = [next(batches) for _ in range(self.train.gradient_accumulation)]
        self.watch.count(window)
        totals = StepTotals(self.ranks.device)
        for batch in window:
            totals.take_skipped(batch)

        # Forward and backward of each micro-batch, and the optimizer.
        if self.engine.model.limit is not None:
            self.engine.model.limit.begin(limit, len(window))
        outcomes = self.engine.train_step(window)

        # The figures of all ranks; every rank then knows the same and decides alike.
        for outcome in outcomes:
            totals.add(outcome)
        if self.notice.received:
            totals.ask_to_end()
        total = totals.reduce(self.ranks, losses=self.layout.data_parallel.world_size * len(window))
        self._asked_to_end = total["asked_to_end"] > 0
        self.reporter.ran(step, window, outcomes)
        norm = self.engine.gradient_norm()
        left_out = self._judge(total, norm, limit, deepspeed_skipped=self.engine.skipped_steps() > skipped)

        self.state.step = step
        self.state.samples_seen += self.train.batch_size
        seconds = time.perf_counter() - started
        return step_metrics(
            total,
            step=step,
            left_out=left_out,
            gradient_norm=norm,
            learning_rate=learning_rate,
            skipped_blocks=round(total["skipped_blocks"] / self.layout.stages),
            tokens_per_second=total["plain_count"] / seconds,
            peak_memory_gib=peak_memory_gib(self.ranks.device),
        )

    def _judge(self, total: dict[str, float], norm: float, limit: float, *, deepspeed_skipped: bool) -> str | None:
        """Return ``spike`` or ``nan`` if a step was a bad one, which changed nothing; tell the guard of a good one.

        A NaN token is left out of the selection, so the plain loss must be looked at too; and DeepSpeed leaves out a
        step with a gradient that is not finite without a word.
        """
        plain = total["plain_sum"] / max(1.0, total["plain_count"])
        if plain > limit:
            return "spike"
        if deepspeed_skipped or not math.isfinite(total["loss"] + plain + norm):
            return "nan"
        if total["plain_count"]:
            self.guard.good(plain)
        return None

    def _seed_dropout(self, step: int) -> None:
        """Make random numbers a function of (seed, step, rank), so that a resumed run draws the same ones."""
        torch.manual_seed(((self.run.seed * 1_000_003 + step) * 65_537 + self.ranks.rank) % 2**63)

    def _handle_bad_step(self, metrics: StepMetrics) -> GuardAction:
        """Do what the guard says about a bad step.

        Raises:
            DualtokError: it says stop.
        """
        spike = metrics.left_out == "spike"
        action = self.guard.bad(spike=spike)
        seen = f"mean token loss {metrics.plain_loss:.4g}, gradient norm {metrics.gradient_norm:.4g}"
        if action == "stop":
            raise DualtokError(
                f"step {metrics.step}: training diverged ({seen}); lower train.learning_rate or selection.alpha and "
                f"resume from the last checkpoint in {self.checkpoints}, or see train.guard"
            )
        if action == "lower_alpha":
            self.engine.model.scale_alpha(self.train.guard.alpha_factor)
        if action == "roll_back":
            self._roll_back()
        self.reporter.note(
            f"step {metrics.step}: {seen}: {'a spike' if spike else 'not finite'}; {action.replace('_', ' ')}"
        )
        return action

    def _roll_back(self) -> None:
        """Go back to the last checkpoint, but not in the data: what was read since then is not read again."""
        self.writer.wait()
        seen = self.state.samples_seen
        saved = find_checkpoint(self.checkpoints, ranks=self.ranks)
        self.state = LoopState(**load_checkpoint(self.engine, saved))
        self.state.samples_seen = seen
        self.reporter.rewind(self.state.step)

    def _evaluate_when_due(self) -> Evaluation | None:
        every, step = self.train.evaluate_every, self.state.step
        if step != self.total_steps and not (every and step % every == 0):
            return None
        self.reporter.doing(f"evaluating after step {step}")
        rows = max(1, self.train.batch_size // self.train.gradient_accumulation // self.layout.data_parallel.world_size)
        evaluation = evaluate(
            self.engine,
            self.stream,
            self.validation,
            blocks=self.train.evaluation_blocks,
            batch_size=rows,
            step=step,
            reference=self.reference,
        )
        if not math.isfinite(evaluation.validation_loss):  # before a checkpoint of such weights replaces a good one
            raise DualtokError(
                f"step {step}: the validation loss is {evaluation.validation_loss}, training diverged; lower "
                f"train.learning_rate or selection.alpha and resume from the last checkpoint in {self.checkpoints}"
            )
        self.reporter.evaluation(evaluation)
        return evaluation

    def _save_when_due(self, evaluation: Evaluation | None) -> None:
        every, step = self.train.checkpoint_every, self.state.step
        improved = evaluation is not None and evaluation.validation_loss < self.state.best_loss
        if improved and evaluation is not None:
            self.state.best_loss, self.state.best_step = evaluation.validation_loss, step
        if every is None and self.train.evaluate_every is None:
            every = CHECKPOINT_EVERY
        due = step % every == 0 if every else evaluation is not None
        if not (due or improved or step == self.total_steps or self._asked_to_end):
            return
        self.reporter.doing(f"writing the checkpoint of step {step}")
        self.state.guard = self.guard.state()
        self.writer.save(self.engine, step, asdict(self.state), best=improved)

    def _end_when_asked(self) -> None:
        """End early if any rank was asked to, with the checkpoint of this step complete.

        Raises:
            Preempted: so it is.
        """
        if self._asked_to_end and self.state.step < self.total_steps:
            self.writer.wait()
            raise Preempted(
                f"asked to end after step {self.state.step} of {self.total_steps}; its checkpoint "
                f"is in {self.checkpoints}, resume with --resume"
            )
