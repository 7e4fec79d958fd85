"""What a training run reports, each kind in a callback of its own: files, events, the terminal, the watchdog.

The loop tells the :class:`Reporter` what happened; callbacks keep what they need to remember. Every rank calls every
method in the same order, since some callbacks bring figures of all ranks together.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dualtok.config.run import flat
from dualtok.monitor.channel import Channel
from dualtok.monitor.events import EventWriter, fixed_bins
from dualtok.monitor.progress import RunProgress
from dualtok.objective.head import IGNORED_LABEL
from dualtok.train.history import History
from dualtok.train.monitors import scalar_writers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType

    from dualtok.config.run import RunConfig
    from dualtok.distributed.ranks import Ranks
    from dualtok.distributed.watchdog import Watchdog
    from dualtok.model.losses import Batch
    from dualtok.monitor.ranks import Efficiency
    from dualtok.objective.token_weights import WeightedLoss
    from dualtok.train.evaluation import Evaluation
    from dualtok.train.history import StepMetrics
    from dualtok.train.watch import RunWatch


class Callback:
    """Reports one thing; each method does nothing unless a subclass has something to report then."""

    def doing(self, text: str) -> None:
        """The run begins something that may take long: a step, an evaluation, a checkpoint."""

    def ran(self, step: int, window: Sequence[Batch], outcomes: Sequence[WeightedLoss]) -> None:
        """Forward, backward and optimizer of a step have run; ``outcomes`` is empty on stages that compute no loss."""

    def step(self, metrics: StepMetrics) -> None:
        """A step is over."""

    def evaluation(self, evaluation: Evaluation) -> None:
        """An evaluation is over."""

    def note(self, text: str) -> None:
        """Something happened that a person should read."""

    def rewind(self, step: int) -> None:
        """The run went back to the checkpoint of ``step``: later steps will be trained again."""

    def close(self) -> None:
        """The run has reached its last step, and its checkpoints are complete."""


class Reporter:
    """Passes on what happens to each callback in turn."""

    def __init__(self, callbacks: Sequence[Callback] = (), progress: RunProgress | None = None) -> None:
        self._callbacks = callbacks
        self._progress = progress

    def __enter__(self) -> Reporter:
        """Start drawing on the terminal."""
        if self._progress is not None:
            self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stop drawing."""
        if self._progress is not None:
            self._progress.__exit__(kind, error, tb)

    def doing(self, text: str) -> None:
        """See :meth:`Callback.doing`."""
        for callback in self._callbacks:
            callback.doing(text)

    def ran(self, step: int, window: Sequence[Batch], outcomes: Sequence[WeightedLoss]) -> None:
        """See :meth:`Callback.ran`."""
        for callback in self._callbacks:
            callback.ran(step, window, outcomes)

    def step(self, metrics: StepMetrics) -> None:
        """See :meth:`Callback.step`."""
        for callback in self._callbacks:
            callback.step(metrics)

    def evaluation(self, evaluation: Evaluation) -> None:
        """See :meth:`Callback.evaluation`."""
        for callback in self._callbacks:
            callback.evaluation(evaluation)

    def note(self, text: str) -> None:
        """See :meth:`Callback.note`."""
        for callback in self._callbacks:
            callback.note(text)

    def rewind(self, step: int) -> None:
        """See :meth:`Callback.rewind`."""
        for callback in self._callbacks:
            callback.rewind(step)

    def close(self) -> None:
        """See :meth:`Callback.close`."""
        for callback in self._callbacks:
            callback.close()


def open_reporter(
    run: RunConfig,
    *,
    folder: Path,
    ranks: Ranks,
    watch: RunWatch,
    done: int,
    total_steps: int,
    watchdog: Watchdog | None = None,
    efficiency: Efficiency | None = None,
) -> Reporter:
    """Return the reporter of a run; what is written, rank 0 writes.

    Args:
        run: the run's settings.
        folder: the run's.
        ranks: the job's.
        watch: this rank's counts and times.
        done: optimizer steps done before; entries of later ones are dropped from files that exist.
        total_steps: of the whole run.
        watchdog: is told of progress.
        efficiency: FLOPs and peak used to compute the model FLOPs utilization (MFU).
    """
    written = folder if ranks.is_first else None
    events = _open_events(run, written, done)
    log_every = run.monitor.log_every
    progress = RunProgress(
        f"train {run.objective}", total_steps, active=ranks.is_first, plain_every=log_every, start=done
    )

    def is_logged(step: int) -> bool:
        return step % log_every == 0 or step == total_steps

    callbacks: list[Callback] = [
        _Histories(written, done),
        _Terminal(progress),
        _Scalars(events, run.objective, is_logged),
        _RankTables(events, written, watch, is_logged, done=done, efficiency=efficiency),
    ]
    if run.monitor.histogram_every:
        callbacks.append(_CalibratedHistogram(events, ranks, run.monitor.histogram_every))
    if watchdog is not None:
        callbacks.append(_Beats(watchdog))
    return Reporter(callbacks, progress)


def _open_events(run: RunConfig, folder: Path | None, done: int) -> EventWriter:
    """Return what writes a run's events; without a folder, on other ranks, nothing does."""
    if folder is None:
        return EventWriter(None)
    events = EventWriter(
        folder / "events" if run.monitor.tensorboard else None, done + 1, scalar_writers(run.monitor, folder, done)
    )
    events.text("run", run.to_yaml(), done)
    events.settings(compared_settings(run))
    return events


class _Histories(Callback):
    """``metrics.jsonl`` and ``evaluations.jsonl``. A run needs them: an error in writing them ends it."""

    def __init__(self, folder: Path | None, done: int) -> None:
        self._steps = History(folder and folder / "metrics.jsonl", done)
        self._evaluations = History(folder and folder / "evaluations.jsonl", done)

    def step(self, metrics: StepMetrics) -> None:
        self._steps.append(metrics)

    def evaluation(self, evaluation: Evaluation) -> None:
        self._evaluations.append(evaluation)

    def rewind(self, step: int) -> None:
        for history in (self._steps, self._evaluations):
            history.forget_after(step)


class _Terminal(Callback):
    """A progress bar, or plain lines where there is no terminal."""

    def __init__(self, progress: RunProgress) -> None:
        self._progress = progress

    def step(self, metrics: StepMetrics) -> None:
        self._progress.advance(1, f"loss {metrics.loss:.4f} {metrics.tokens_per_second:,.0f} tokens/s")

    def evaluation(self, evaluation: Evaluation) -> None:
        auc = "" if evaluation.ref_auc is None else f", Ref AUC {evaluation.ref_auc:.3f}"
        self._progress.note(
            f"step {evaluation.step}: validation perplexity {evaluation.perplexity:.2f}, "
            f"member/validation gap {evaluation.gap:.3f} nats{auc}"
        )

    def note(self, text: str) -> None:
        self._progress.note(text)

    def rewind(self, step: int) -> None:
        self._progress.rewind(step)


class _Scalars(Callback):
    """Scalars of steps and evaluations, for TensorBoard and the others of ``monitor``."""

    def __init__(self, events: EventWriter, objective: str, is_logged: Callable[[int], bool]) -> None:
        self._events, self._objective, self._is_logged = events, objective, is_logged

    def step(self, metrics: StepMetrics) -> None:
        if self._is_logged(metrics.step):
            self._events.scalars(step_scalars(metrics, self._objective), metrics.step)

    def evaluation(self, evaluation: Evaluation) -> None:
        self._events.scalars(evaluation_scalars(evaluation), evaluation.step)
        self._events.flush()

    def rewind(self, step: int) -> None:
        self._events.forget_after(step)

    def close(self) -> None:
        self._events.close()


class _RankTables(Callback):
    """The times of all ranks, brought together once per log interval: scalars, and ``ranks.jsonl``."""

    def __init__(
        self,
        events: EventWriter,
        folder: Path | None,
        watch: RunWatch,
        is_logged: Callable[[int], bool],
        *,
        done: int,
        efficiency: Efficiency | None,
    ) -> None:
        self._events, self._watch, self._is_logged, self._efficiency = events, watch, is_logged, efficiency
        self._file = Channel("ranks.jsonl", lambda: History(folder and folder / "ranks.jsonl", done))

    def step(self, metrics: StepMetrics) -> None:
        if not self._is_logged(metrics.step):
            return
        table, steps = self._watch.table()
        self._events.scalars(table.scalars(self._efficiency), metrics.step)
        self._file.use(partial(History.append, entry=table.entry(metrics.step, steps)))

    def rewind(self, step: int) -> None:
        self._file.use(lambda history: history.forget_after(step))


class _CalibratedHistogram(Callback):
    """The distribution of s over all tokens of a step."""

    def __init__(self, events: EventWriter, ranks: Ranks, every: int) -> None:
        self._events, self._ranks, self._every = events, ranks, every

    def ran(self, step: int, window: Sequence[Batch], outcomes: Sequence[WeightedLoss]) -> None:
        if step % self._every or "reference_loss" not in window[0]:
            return
        bins = fixed_bins(torch.zeros(0))  # what a stage without a loss adds
        for outcome, batch in zip(outcomes, window, strict=False):
            bins += fixed_bins(outcome.weights.calibrated.cpu()[batch["labels"] != IGNORED_LABEL])
        everyone = self._ranks.sum(bins.to(self._ranks.device))
        self._events.histogram("calibrated/s", everyone.cpu().numpy(), step)


class _Beats(Callback):
    """Tells the watchdog, which ends a run that does nothing for too long."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def doing(self, text: str) -> None:
        self._watchdog.beat(text)


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
