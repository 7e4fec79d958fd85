"""The training loop: batches in; steps, evaluations, checkpoints and events out. The same for every engine."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dualtok.config.run import flat
from dualtok.distributed.collectives import timed_collectives
from dualtok.distributed.preemption import PreemptionNotice
from dualtok.errors import CheckpointError, DualtokError, Preempted
from dualtok.monitor.channel import Channel
from dualtok.monitor.events import EventWriter, fixed_bins
from dualtok.monitor.progress import RunProgress
from dualtok.monitor.timing import DATA, REFERENCE
from dualtok.objective.head import IGNORED_LABEL
from dualtok.train.checkpoints.writer import CheckpointWriter, find_checkpoint, load_checkpoint
from dualtok.train.evaluation import Evaluation, evaluate
from dualtok.train.guard import Guard, LossLimit
from dualtok.train.history import History, StepMetrics
from dualtok.train.metrics import StepTotals, peak_memory_gib, step_metrics
from dualtok.train.monitors import scalar_writers
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
    from dualtok.train.engines.protocol import TrainingEngine


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
        efficiency: what the model FLOP utilization is reckoned with.
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
        self.notice = PreemptionNotice()
        self.watch = RunWatch(self.engine.timer, self.layout)
        self._asked_to_end = False

    def resume(self, saved: SavedCheckpoint) -> None:
        """Continue from a complete checkpoint, which any layout may have written."""
        state = LoopState(**load_checkpoint(self.engine, saved))
        if state.blocks != self.state.blocks:
            raise CheckpointError(
                f"{saved.folder}: trained on other blocks than {self.run.data.dir} (or a folder of data.mix) holds "
                "now; restore them"
            )
        self._restore_guard(state)
        self.state = state

    def _restore_guard(self, state: LoopState) -> None:
        before = self.guard.alpha_scale
        if state.guard:
            self.guard.restore(state.guard)
        self.engine.model.scale_alpha(self.guard.alpha_scale / before)

    def fit(self) -> LoopState:
        """Train until the last step.

        Raises:
            DualtokError: training diverged, and the guard does not go on.
            Preempted: the job was asked to end; a checkpoint of the last step is complete.
        """
        with self.notice, timed_collectives(self.engine.timer):
            self._fit()
        return self.state

    def _fit(self) -> None:
        first = self.ranks.is_first
        metrics = History(self.folder / "metrics.jsonl" if first else None, self.state.step)
        evaluations = History(self.folder / "evaluations.jsonl" if first else None, self.state.step)
        events, times = self._open_events(), self._open_times()
        batches = self.batches()
        progress = RunProgress(
            f"train {self.run.objective}",
            self.total_steps,
            active=first,
            plain_every=self.run.monitor.log_every,
            start=self.state.step,
        )
        with progress:
            while self.state.step < self.total_steps:
                self._beat(f"in step {self.state.step + 1}")
                outcome = self.step(batches, events)
                self._beat(f"after step {outcome.step}")
                self.writer.check()
                if outcome.left_out is not None and self._answer(outcome, progress) == "roll_back":
                    progress.rewind(self.state.step)
                    for history in (metrics, evaluations):
                        history.forget_after(self.state.step)
                    times.use(lambda ranks: ranks.forget_after(self.state.step))
                    events.forget_after(self.state.step)
                    continue
                metrics.append(outcome)
                progress.advance(1, f"loss {outcome.loss:.4f} {outcome.tokens_per_second:,.0f} tokens/s")
                if self.state.step % self.run.monitor.log_every == 0 or self.state.step == self.total_steps:
                    table, steps = self.watch.table()
                    seen = {**step_scalars(outcome, self.run.objective), **table.scalars(self.efficiency)}
                    events.scalars(seen, outcome.step)
                    times.use(partial(History.append, entry=table.entry(outcome.step, steps)))
                evaluation = self._evaluate_when_due()
                if evaluation is not None:
                    evaluations.append(evaluation)
                    events.scalars(evaluation_scalars(evaluation), evaluation.step)
                    events.flush()
                    progress.note(_describe(evaluation))
                self._save_when_due(evaluation)
                if self._asked_to_end and self.state.step < self.total_steps:
                    self.writer.wait()
                    raise Preempted(
                        f"asked to end after step {self.state.step} of {self.total_steps}; its checkpoint "
                        f"is in {self.checkpoints}, resume with --resume"
                    )
        self.writer.wait()
        events.close()

    def _open_events(self) -> EventWriter:
        """Return what writes this run's events on rank 0, and writes nothing elsewhere."""
        if not self.ranks.is_first:
            return EventWriter(None)
        monitor, done = self.run.monitor, self.state.step
        events = EventWriter(
            self.folder / "events" if monitor.tensorboard else None,
            done + 1,
            scalar_writers(monitor, self.folder, done),
        )
        events.text("run", self.run.to_yaml(), done)
        events.settings(compared_settings(self.run))
        return events

    def _open_times(self) -> Channel:
        """Return what keeps the table of all ranks."""
        file = self.folder / "ranks.jsonl" if self.ranks.is_first else None
        return Channel("ranks.jsonl", lambda: History(file, self.state.step))

    def _beat(self, doing: str) -> None:
        """Report progress, if somebody watches."""
        if self.watchdog is not None:
            self.watchdog.beat(doing)

    def _answer(self, outcome: StepMetrics, progress: RunProgress) -> GuardAction:
        """Do what the guard says about a bad step.

        Raises:
            DualtokError: it says stop.
        """
        spike = outcome.left_out == "spike"
        action = self.guard.bad(spike=spike)
        seen = f"mean token loss {outcome.plain_loss:.4g}, gradient norm {outcome.gradient_norm:.4g}"
        if action == "stop":
            raise DualtokError(
                f"step {outcome.step}: training diverged ({seen}); lower train.learning_rate or selection.alpha and "
                f"resume from the last checkpoint in {self.checkpoints}, or see train.guard"
            )
        if action == "lower_alpha":
            self.engine.model.scale_alpha(self.train.guard.alpha_factor)
        if action == "roll_back":
            self._roll_back()
        progress.note(
            f"step {outcome.step}: {seen}: {'a spike' if spike else 'not finite'}; {action.replace('_', ' ')}"
        )
        return action

    def _roll_back(self) -> None:
        """Go back to the last checkpoint, but not in the data: what was read since then is not read again."""
        self.writer.wait()
        seen = self.state.samples_seen
        saved = find_checkpoint(self.checkpoints, ranks=self.ranks)
        self.state = LoopState(**load_checkpoint(self.engine, saved))
        self.state.samples_seen = seen

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

    def step(self, batches: Iterator[Batch], events: EventWriter) -> StepMetrics:
        """Run one optimizer step and measure it; ``left_out`` says whether it was a bad one, alike on every rank."""
        with self.engine.timer.step():
            return self._step(batches, events)

    def _step(self, batches: Iterator[Batch], events: EventWriter) -> StepMetrics:
        started = time.perf_counter()
        step = self.state.step + 1
        self._seed_dropout(step)
        learning_rate = self.engine.learning_rate()
        totals = StepTotals(self.ranks.device)
        histogram = self.run.monitor.histogram_every
        window = [next(batches) for _ in range(self.train.gradient_accumulation)]
        self.watch.count(window)
        for batch in window:
            totals.take_skipped(batch)
        skipped, limit = self.engine.skipped_steps(), self.guard.limit()
        if self.engine.model.limit is not None:
            self.engine.model.limit.begin(limit, len(window))
        outcomes = self.engine.train_step(window)
        for outcome in outcomes:
            totals.add(outcome)
        if self.notice.received:
            totals.ask_to_end()
        total = totals.reduce(self.ranks, losses=self.layout.data_parallel.world_size * len(window))
        self._asked_to_end = total["asked_to_end"] > 0
        if histogram and step % histogram == 0 and "reference_loss" in window[0]:
            bins = fixed_bins(torch.zeros(0))  # what a stage without a loss adds
            for outcome, batch in zip(outcomes, window, strict=False):
                bins += fixed_bins(outcome.weights.calibrated.cpu()[batch["labels"] != IGNORED_LABEL])
            events.histogram("calibrated/s", self.ranks.sum(bins.to(self.ranks.device)).cpu().numpy(), step)
        norm = self.engine.gradient_norm()
        # A NaN token is left out of the selection, so the plain loss must be looked at too; and DeepSpeed leaves out a
        # step with a gradient that is not finite without a word.
        plain = total["plain_sum"] / max(1.0, total["plain_count"])
        left_out = None
        if plain > limit:
            left_out = "spike"
        elif self.engine.skipped_steps() > skipped or not math.isfinite(total["loss"] + plain + norm):
            left_out = "nan"
        elif total["plain_count"]:
            self.guard.good(plain)
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

    def _seed_dropout(self, step: int) -> None:
        """Make random numbers a function of (seed, step, rank), so that a resumed run draws the same ones."""
        torch.manual_seed(((self.run.seed * 1_000_003 + step) * 65_537 + self.ranks.rank) % 2**63)

    def _evaluate_when_due(self) -> Evaluation | None:
        every, step = self.train.evaluate_every, self.state.step
        if step != self.total_steps and not (every and step % every == 0):
            return None
        self._beat(f"evaluating after step {step}")
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
        self._beat(f"writing the checkpoint of step {step}")
        self.state.guard = self.guard.state()
        self.writer.save(self.engine, step, asdict(self.state), best=improved)


def step_scalars(metrics: StepMetrics, objective: str) -> dict[str, float | None]:
    """Return a step's TensorBoard scalars under their names; ``loss/dual`` is the loss of the objective ``dual``."""
    return {
        f"loss/{objective}": metrics.loss,
        "loss/hard": metrics.hard_loss,
        "loss/memorized": metrics.memorized_loss,
        "loss/plain": metrics.plain_loss,
        **{f"share/{name}": share for name, share in metrics.shares.items()},
        "data/skipped_blocks": metrics.skipped_blocks,
        "optimizer/learning_rate": metrics.learning_rate,
        "optimizer/gradient_norm": metrics.gradient_norm,
        "throughput/tokens_per_second": metrics.tokens_per_second,
        "memory/peak_gib": metrics.peak_memory_gib,
    }


def compared_settings(run: RunConfig) -> dict[str, Any]:
    """Return the settings by which runs are compared, by dotted name; not where they read and write."""
    tree = run.as_dict()
    sections = ("seed", "objective", "model", "train", "selection", "goldfish", "privacy", "reference")
    return flat({name: tree[name] for name in sections})


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
