"""Parts of the documents that a model is trained without: folds, for cross-fitting, and the halves of shadow models.

A model that left a fold out judges its documents without having seen them. Which part a document is in is a function of
its id alone, on every machine and whatever other documents there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def fold_of(documents: ArrayLike, folds: int) -> NDArray[np.int64]:
    """Return the fold of each document, a function of its id alone, in every split and on every machine.

    Ids are mixed, so that folds do not follow an order of the source.
    """
    return (_mixed(np.asarray(documents).astype(np.uint64)) % np.uint64(folds)).astype(np.int64)


def in_shadow(documents: ArrayLike, shadow: int, seed: int) -> NDArray[np.bool_]:
    """Return whether a shadow model is trained on each document.

    Shadows come in pairs: of 2i and 2i + 1 a document is in exactly one, drawn at random for each pair. So among an
    even number of shadows every document is in one half of them, as in Carlini et al. 2022, and further shadows
    change nothing about those that are there.

    Args:
        documents: ids.
        shadow: its number, from 0.
        seed: of the draws.
    """
    pair, second = divmod(shadow, 2)
    key = _mixed(_mixed(np.array([seed], np.uint64)) ^ np.uint64(pair))
    ids = _mixed(np.asarray(documents).astype(np.uint64))
    return (_mixed(ids ^ key) >> np.uint64(63)) == np.uint64(second)


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64 of each number (Steele et al. 2014): all bits depend on all of its bits."""
    with np.errstate(over="ignore"):
        mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
