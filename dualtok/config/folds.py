"""Which fold of the documents a run leaves out."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(config=ConfigDict(extra="forbid"))
class LeaveOut:
    """One of several folds, whose documents are not learned."""

    fold: Annotated[int, Field(ge=0)]
    """The fold to leave out, counted from 0. Unit: none."""

    folds: Annotated[int, Field(ge=2)]
    """Folds in all. Unit: folds."""

    def __post_init__(self) -> None:
        """Refuse a fold that is not there."""
        if self.fold >= self.folds:
            raise ValueError(f"leave_out.fold: {self.fold} of {self.folds} folds; they are counted from 0")
