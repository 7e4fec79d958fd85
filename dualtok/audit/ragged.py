"""Sums and means over ragged arrays: the values of all documents end to end, cut by ``offsets``.

Legend: n documents, k values of all documents together; ``offsets`` is int64 [n + 1] from 0 to k.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Offsets = NDArray[np.int64]

# Room for share * n that is whole but for rounding: 0.7 * 10 must give 7, not 6 (same rule as the selection's shares).
ROUNDING = 1e-9


def segment_sum(values: NDArray[np.generic], offsets: Offsets) -> Floats:
    """Return the float64 sum [n] of each segment of ``values`` [k]; an empty segment sums to 0."""
    sums = np.zeros(len(offsets) - 1, dtype=np.float64)
    filled = np.diff(offsets) > 0
    if filled.any():
        # Empty segments take no room, so that the starts of the others still cut the values without a gap.
        sums[filled] = np.add.reduceat(values.astype(np.float64), offsets[:-1][filled])
    return sums


def lowest_mean(values: NDArray[np.floating], offsets: Offsets, share: float) -> Floats:
    """Return the mean [n] of the lowest ``share`` of each segment: floor(share * length) values, but at least one.

    Every segment must have a value; equal values are interchangeable, so ties need no rule.
    """
    lengths = np.diff(offsets)
    segment = np.repeat(np.arange(len(lengths)), lengths)
    in_order = values[np.lexsort((values, segment))].astype(np.float64)
    rank = np.arange(len(values)) - offsets[:-1][segment]
    taken = np.maximum(1, np.floor(share * lengths + ROUNDING))
    return segment_sum(np.where(rank < taken[segment], in_order, 0.0), offsets) / taken
