"""Sums and means over ragged arrays: the values of all documents end to end, cut by ``offsets``.

Legend: n documents, k values of all documents together; ``offsets`` is int64 [n + 1] from 0 to k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def segment_mean(values: NDArray[np.generic], offsets: Offsets) -> Floats:
    """Return the float64 mean [n] of each segment of ``values`` [k]; every segment must have a value."""
    return segment_sum(values, offsets) / np.diff(offsets)


def segment_quantiles(values: NDArray[np.floating], offsets: Offsets, shares: Sequence[float]) -> Floats:
    """Return quantiles [n, len(shares)] of each segment, linear between the two nearest values as ``np.quantile``.

    Every segment must have a value.
    """
    in_order = _sorted_within(values, offsets)
    lengths, first = np.diff(offsets)[:, None], offsets[:-1][:, None]
    position = np.asarray(shares)[None, :] * (lengths - 1)
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, lengths - 1)
    low, high = in_order[first + below], in_order[first + above]
    quantiles: Floats = low + (high - low) * (position - below)
    return quantiles


def _sorted_within(values: NDArray[np.floating], offsets: Offsets) -> Floats:
    """Return the values, ascending within each segment."""
    # One short sort per document takes a twentieth of the time of one lexsort of all tokens.
    in_order = values.astype(np.float64)
    for first, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        in_order[first:end].sort()
    return in_order


def lowest_mean(values: NDArray[np.floating], offsets: Offsets, share: float) -> Floats:
    """Return the mean [n] of the lowest ``share`` of each segment: floor(share * length) values, but at least one.

    Every segment must have a value; equal values are interchangeable, so ties need no rule.
    """
    lengths = np.diff(offsets)
    segment = np.repeat(np.arange(len(lengths)), lengths)
    in_order = _sorted_within(values, offsets)
    rank = np.arange(len(values)) - offsets[:-1][segment]
    selected = _selected(lengths, share)
    return segment_sum(np.where(rank < selected[segment], in_order, 0.0), offsets) / selected


def lowest(values: NDArray[np.floating], offsets: Offsets, share: float) -> NDArray[np.bool_]:
    """Return which values [k] are among the lowest ``share`` of their segment, counted as in :func:`lowest_mean`.

    Values equal to the greatest of them are among them, too.
    """
    lengths = np.diff(offsets)
    greatest = _sorted_within(values, offsets)[offsets[:-1] + _selected(lengths, share) - 1]
    among: NDArray[np.bool_] = values <= np.repeat(greatest, lengths)
    return among


def _selected(lengths: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """Return floor(share * length) of each segment [n], but at least one."""
    selected: NDArray[np.int64] = np.maximum(1, np.floor(share * lengths + ROUNDING)).astype(np.int64)
    return selected
