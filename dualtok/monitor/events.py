"""Events of a training run, written by rank 0 alone: to TensorBoard, and their scalars to whatever else is named."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dualtok.monitor.channel import BackgroundChannel, Channel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch
    from torch.utils.tensorboard import SummaryWriter

# Imported where they are used, for what they take to load: TensorBoard (1 s).

HISTOGRAM_RANGE = 8.0
HISTOGRAM_BINS = 128

LAYOUT: dict[str, dict[str, list[Any]]] = {
    "Learning": {
        "losses": ["Multiline", ["loss/.*"]],
        "shares of tokens": ["Multiline", ["share/.*"]],
        "validation and members": ["Multiline", ["evaluation/validation_loss", "evaluation/member_loss"]],
        "privacy": ["Multiline", ["evaluation/ref_auc", "evaluation/member_gap"]],
    },
    "Speed": {
        "seconds per step, mean over ranks": ["Multiline", ["time/.*"]],
        "seconds per step, slowest rank of each": ["Multiline", ["time_max/.*"]],
        "use of the devices": ["Multiline", ["throughput/mfu", "pipeline/bubble"]],
        "tokens per second": ["Multiline", ["throughput/tokens_per_second"]],
    },
    "Data and ranks": {
        "reading ahead": ["Multiline", ["data/.*"]],
        "stragglers": ["Multiline", ["ranks/slowest_ratio"]],
        "memory": ["Multiline", ["memory/.*"]],
    },
}
"""TensorBoard's page of custom scalars: charts by category, each of all scalars whose names match."""

HPARAM_METRICS = (
    "loss/plain",
    "evaluation/validation_loss",
    "evaluation/member_gap",
    "evaluation/ref_auc",
    "throughput/tokens_per_second",
    "throughput/mfu",
)
"""Scalars beside which TensorBoard's page HParams shows a run's settings."""


class ScalarWriter(Protocol):
    """Takes scalars, beside TensorBoard."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write the scalars of an optimizer step; steps go backwards only after :meth:`forget_after`."""

    def forget_after(self, step: int) -> None:
        """Take back what was written of later steps, where that can be."""

    def close(self) -> None:
        """Bring all to where it belongs."""


class EventWriter:
    """Scalars and histograms under the names of the table in ``docs/monitoring.md``.

    Whatever of it fails is left out from then on, after a warning.

    Args:
        folder: where the event files go; None writes none (other ranks, or TensorBoard turned off).
        purge_step: events from this step on are hidden; set when a run is resumed.
        others: what makes further writers of scalars, by the name that a warning gives them; each has a thread of its
            own, so that a server out of reach delays nothing.
    """

    def __init__(
        self,
        folder: Path | None,
        purge_step: int | None = None,
        others: Mapping[str, Callable[[], ScalarWriter]] | None = None,
    ) -> None:
        self._tensorboard: Channel | None = None
        if folder is not None:
            self._tensorboard = Channel("monitor.tensorboard", lambda: _summary_writer(folder, purge_step))
            self._board(lambda writer: writer.add_custom_scalars(LAYOUT))
        self._others = [BackgroundChannel(name, opener) for name, opener in (others or {}).items()]

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Write scalars; None and NaN, which TensorBoard would draw as gaps, are left out."""
        known = {name: value for name, value in values.items() if value is not None and not math.isnan(value)}

        def write(writer: SummaryWriter) -> None:
            for name, value in known.items():
                writer.add_scalar(name, value, step)

        self._board(write)
        for other in self._others:
            other.use(lambda writer: writer.scalars(known, step))

    def forget_after(self, step: int) -> None:
        """Take back the events of later steps, which will be trained again."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        def hide(writer: SummaryWriter) -> None:
            restart = Event(session_log=SessionLog(status=SessionLog.START))
            writer._get_file_writer().add_event(restart, step + 1)

        self._board(hide)
        for other in self._others:
            other.use(lambda writer: writer.forget_after(step))

    def histogram(self, name: str, counts: np.ndarray, step: int) -> None:
        """Write a histogram given as :func:`fixed_bins` counts, summed over ranks."""
        if self._tensorboard is None or counts.sum() == 0:
            return
        edges = np.linspace(-HISTOGRAM_RANGE, HISTOGRAM_RANGE, HISTOGRAM_BINS + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        filled = np.flatnonzero(counts)
        self._board(
            lambda writer: writer.add_histogram_raw(
                name,
                min=float(edges[filled[0]]),
                max=float(edges[filled[-1] + 1]),
                num=int(counts.sum()),
                sum=float((counts * middles).sum()),
                sum_squares=float((counts * middles**2).sum()),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
            )
        )

    def text(self, name: str, content: str, step: int = 0) -> None:
        """Write a text, shown as it is."""
        self._board(lambda writer: writer.add_text(name, f"```\n{content}\n```", step))

    def settings(self, values: Mapping[str, Any]) -> None:
        """Write a run's settings for the page HParams, where runs are compared by them.

        Args:
            values: by dotted name; None is left out, what is no number, bool or text is written as text.
        """
        from torch.utils.tensorboard.summary import hparams

        shown = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in values.items()
            if value is not None
        }

        def write(writer: SummaryWriter) -> None:
            # SummaryWriter.add_hparams would make a run of its own; the third summary says that the run has ended.
            for summary in hparams(shown, dict.fromkeys(HPARAM_METRICS))[:2]:
                writer._get_file_writer().add_summary(summary)

        self._board(write)

    def flush(self) -> None:
        """Bring everything to disk."""
        self._board(lambda writer: writer.flush())

    def close(self) -> None:
        """Flush and close the event file, and end the others."""
        self._board(lambda writer: writer.close())
        for other in self._others:
            other.use(lambda writer: writer.close())
        for other in self._others:
            other.end()

    def _board(self, action: Callable[[SummaryWriter], object]) -> None:
        if self._tensorboard is not None:
            self._tensorboard.use(action)


def _summary_writer(folder: Path, purge_step: int | None) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=purge_step)


def fixed_bins(calibrated: torch.Tensor) -> torch.Tensor:
    """Count values of s(t) in :data:`HISTOGRAM_BINS` equal bins over +-:data:`HISTOGRAM_RANGE`; the ends take outliers.

    Fixed bins can be summed over ranks, where the values themselves would have to be gathered.
    """
    return (
        calibrated.float()
        .clamp(-HISTOGRAM_RANGE, HISTOGRAM_RANGE)
        .histc(HISTOGRAM_BINS, -HISTOGRAM_RANGE, HISTOGRAM_RANGE)
    )
