"""Folds of documents, for cross-fitting: a model that left a fold out judges its documents without having seen them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(config=ConfigDict(extra="forbid"))
class LeaveOut:
    """One of several folds, whose documents are not learned."""

    fold: Annotated[int, Field(ge=0)]
    """The fold to leave out, counted from 0."""

    folds: Annotated[int, Field(ge=2)]
    """Folds in all."""

    def __post_init__(self) -> None:
        """Refuse a fold that is not there."""
        if self.fold >= self.folds:
            raise ValueError(f"leave_out.fold: {self.fold} of {self.folds} folds; they are counted from 0")

    def leaves(self, documents: ArrayLike) -> NDArray[np.bool_]:
        """Return whether each document is left out."""
        return fold_of(documents, self.folds) == self.fold


def fold_of(documents: ArrayLike, folds: int) -> NDArray[np.int64]:
    """Return the fold of each document, a function of its id alone, in every split and on every machine.

    Ids are mixed (SplitMix64, Steele et al. 2014), so that folds do not follow an order of the source.
    """
    mixed = np.asarray(documents).astype(np.uint64)
    with np.errstate(over="ignore"):
        mixed = mixed + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(folds)).astype(np.int64)
