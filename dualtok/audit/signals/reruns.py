"""What is left of documents when a model is run again over changed texts: a few numbers per document.

A document is its first ``block_length`` tokens here, end token included; what lies beyond is left alone. Each rerun
also takes the plain loss over the very tokens that its other numbers are about.

Legend: n documents.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings_dataclass

from dualtok.errors import DataError
from dualtok.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path


Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
Answer = dict[str, NDArray[np.generic]]
Side = Literal["members", "non_members"]

FORMAT = 1


@settings_dataclass(config=ConfigDict(extra="forbid"))
class RerunSettings:
    """The attacks that run each model again; a setting of one that is not in ``audit.attacks`` is an error."""

    prefix_documents: Annotated[int, Field(ge=1)] = 8
    """ReCaLL, Con-ReCall: documents of a class put in front of every other document, at most half of the class. They
    are taken out of the whole audit. The code of Con-ReCall takes 12. Unit: documents."""

    prefix_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """ReCaLL, Con-ReCall: share of a block's tokens that they may take; a document is judged by as many of its first
    tokens as fit into the rest."""

    con_recall_gamma: Annotated[float, Field(ge=0)] = 0.5
    """Con-ReCall: weight of the log-likelihood given members. The code of Wang et al. 2024 tries 0.1 to 1. Unit:
    none."""

    neighbors: Annotated[int, Field(ge=1)] = 25
    """Neighborhood: changed texts per document, each of which costs as much as the document itself. Unit: texts."""

    neighbor_share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Neighborhood: share of a document's tokens that are replaced in each, at least one."""


class Scorer(Protocol):
    """A model that answers for sequences of tokens, e.g. :class:`dualtok.model.sequence_scorer.SequenceScorer`."""

    def losses(self, sequences: Sequence[Ids]) -> list[Floats]:
        """Return -log p of each token after a sequence's first, in nats: [length - 1]."""

    def candidates(self, sequences: Sequence[Ids], count: int) -> list[Answer]:
        """Return ``loss`` [length - 1] of each sequence, and of the likeliest other tokens ``other`` (ids) and
        ``weight`` (probabilities), both [length - 1, count]."""


@dataclass(frozen=True, eq=False)
class RerunResult:
    """What a rerun left of n documents. Raises DataError if lengths do not fit or a value is not finite."""

    document: Ids
    """Document ids [n], ascending, each once."""

    values: Mapping[str, Floats]
    """Column -> one number per document [n]."""

    def __post_init__(self) -> None:
        """Check the columns against the documents."""
        if (np.diff(self.document) <= 0).any():
            raise DataError("reruns: the documents do not ascend")
        for name, column in self.values.items():
            if column.shape != self.document.shape:
                raise DataError(f"reruns: {name} has shape {column.shape} for {len(self.document)} documents")
            bad = self.document[~np.isfinite(column)]
            if len(bad):
                raise DataError(f"reruns: {name} of document {bad[0]} is not finite; the model's losses are not either")

    def of(self, documents: Ids) -> dict[str, Floats]:
        """Return the columns of the given documents, in their order.

        Raises:
            DataError: a document is missing.
        """
        position = np.minimum(np.searchsorted(self.document, documents), max(0, len(self.document) - 1))
        missing = documents[self.document[position] != documents] if len(self.document) else documents
        if len(missing):
            raise DataError(f"reruns: {len(missing)} documents are missing (e.g. document {missing[0]})")
        return {name: column[position] for name, column in self.values.items()}

    def save(self, path: str | Path) -> None:
        """Write one .npz file that is either whole or absent."""
        arrays: dict[str, Any] = {"document": self.document, **self.values}
        with atomic_file(path) as stream:
            np.savez(stream, format=np.int64(FORMAT), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> RerunResult:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: the file cannot be read, or its columns do not fit each other.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            if int(arrays.pop("format")) != FORMAT:
                raise ValueError("another format")
            return cls(document=arrays.pop("document"), values=arrays)
        except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, DataError) as error:
            raise DataError(f"{path}: not a readable file of a rerun ({error}); remove it and audit again") from error


@dataclass(frozen=True)
class Documents:
    """Some documents of a class."""

    numbers: Sequence[int]
    """Their ids."""
    tokens: Sequence[Ids]
    """Their token ids, each at least 2 and at most a block long."""


@dataclass(frozen=True)
class Tools:
    """What reruns use beside the model and the documents."""

    settings: RerunSettings
    seed: int
    block_length: int
    lowercased: Callable[[Sequence[Ids]], list[Ids]]
    """Token ids of documents -> of the same texts in lower case, at least 2 and at most a block long."""
    bos: int | None
    """Id of the token that every document begins with, if there is one."""
    eos: int
    """Id of the token that closes a document."""
    prefixes: Mapping[Side, Ids] = field(default_factory=dict)
    """Members, and non-members, that are put in front of documents."""
    gradient_norm: Callable[[Ids], float] | None = None
    """Norm of the gradient of a document's mean loss; only where the whole model is on a rank."""


@dataclass(frozen=True)
class Rerun:
    """A way to run a model again; ``run`` gives its columns for some documents, and is called by all ranks together."""

    name: str
    run: Callable[[Scorer | None, Documents, Tools], dict[str, Floats]]
    settings: tuple[str, ...] = ()
    """Names of the settings that its columns depend on."""
    prefix: Side | None = None
    """The class whose documents it puts in front."""
    gradients: bool = False
    """Whether it needs gradients, and no scorer."""
