"""Parts of the documents that a model is trained without: folds, for cross-fitting, and the halves of shadow models.

A model that left a fold out judges its documents without having seen them. Which part a document is in is a function of
its id alone, on every machine and whatever other documents there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dualtok.data.hashing import split_mix

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def fold_of(documents: ArrayLike, folds: int) -> NDArray[np.int64]:
    """Return the fold of each document, a function of its id alone, in every split and on every machine.

    Ids are mixed, so that folds do not follow an order of the source.
    """
    return (split_mix(np.asarray(documents).astype(np.uint64)) % np.uint64(folds)).astype(np.int64)


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
    key = split_mix(split_mix(np.array([seed], np.uint64)) ^ np.uint64(pair))
    ids = split_mix(np.asarray(documents).astype(np.uint64))
    return (split_mix(ids ^ key) >> np.uint64(63)) == np.uint64(second)
