"""SplitMix64 (Steele et al. 2014): numbers mixed one to one, so that all bits of a result depend on all bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def split_mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64 of each number: an array, or a single one."""
    with np.errstate(over="ignore"):  # numpy warns where a single number wraps around
        return scrambled(numbers + np.uint64(0x9E3779B97F4A7C15))


def scrambled(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the last part of SplitMix64, for numbers that are spread already; 0 stays 0."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
