"""TensorBoard events of a training run, written by rank 0 alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

HISTOGRAM_RANGE = 8.0
HISTOGRAM_BINS = 128


class EventWriter:
    """Scalars and histograms under the names of the table in ``docs/monitoring.md``.

    Args:
        folder: where the event files go; None writes nothing (other ranks, or TensorBoard turned off).
        purge_step: events from this step on are hidden; set when a run is resumed.
    """

    def __init__(self, folder: Path | None, purge_step: int | None = None) -> None:
        self._writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Write scalars; None and NaN, which TensorBoard would draw as gaps, are left out."""
        if self._writer is not None:
            for name, value in values.items():
                if value is not None and not math.isnan(value):
                    self._writer.add_scalar(name, value, step)

    def histogram(self, name: str, counts: np.ndarray, step: int) -> None:
        """Write a histogram given as :func:`fixed_bins` counts, summed over ranks."""
        if self._writer is None or counts.sum() == 0:
            return
        edges = np.linspace(-HISTOGRAM_RANGE, HISTOGRAM_RANGE, HISTOGRAM_BINS + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        filled = np.flatnonzero(counts)
        self._writer.add_histogram_raw(
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

    def text(self, name: str, content: str, step: int = 0) -> None:
        """Write a text, shown as it is."""
        if self._writer is not None:
            self._writer.add_text(name, f"```\n{content}\n```", step)

    def flush(self) -> None:
        """Bring everything to disk."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()


def fixed_bins(calibrated: torch.Tensor) -> torch.Tensor:
    """Count values of s(t) in :data:`HISTOGRAM_BINS` equal bins over +-:data:`HISTOGRAM_RANGE`; the ends take outliers.

    Fixed bins can be summed over ranks, where the values themselves would have to be gathered.
    """
    return (
        calibrated.float()
        .clamp(-HISTOGRAM_RANGE, HISTOGRAM_RANGE)
        .histc(HISTOGRAM_BINS, -HISTOGRAM_RANGE, HISTOGRAM_RANGE)
    )
