"""Further passes of a model over changed documents, and what each leaves: a few numbers per document.

A document is its first ``block_length`` tokens here, end token included; what lies beyond is left alone. Each pass also
takes the plain loss over the very tokens that its other numbers are about.

Legend: n documents.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from dualtok.errors import DataError
from dualtok.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from dualtok.audit.config import PassConfig
    from dualtok.audit.probe import Probe

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
Side = Literal["members", "non_members"]

FORMAT = 1
CANDIDATES = 10
"""Likeliest other tokens that a neighbour's tokens are drawn from."""


@dataclass(frozen=True, eq=False)
class PassResult:
    """What a pass left of n documents. Raises DataError if lengths do not fit or a value is not finite."""

    document: Ids
    """Document ids [n], ascending, each once."""

    values: Mapping[str, Floats]
    """Column -> one number per document [n]."""

    def __post_init__(self) -> None:
        """Check the columns against the documents."""
        if (np.diff(self.document) <= 0).any():
            raise DataError("passes: the documents do not ascend")
        for name, column in self.values.items():
            if column.shape != self.document.shape:
                raise DataError(f"passes: {name} has shape {column.shape} for {len(self.document)} documents")
            bad = self.document[~np.isfinite(column)]
            if len(bad):
                raise DataError(f"passes: {name} of document {bad[0]} is not finite; the model's losses are not either")

    def of(self, documents: Ids) -> dict[str, Floats]:
        """Return the columns of the given documents, in their order.

        Raises:
            DataError: a document is missing.
        """
        place = np.minimum(np.searchsorted(self.document, documents), max(0, len(self.document) - 1))
        missing = documents[self.document[place] != documents] if len(self.document) else documents
        if len(missing):
            raise DataError(f"passes: {len(missing)} documents are missing (e.g. document {missing[0]})")
        return {name: column[place] for name, column in self.values.items()}

    def save(self, path: str | Path) -> None:
        """Write one .npz file that is either whole or absent."""
        arrays: dict[str, Any] = {"document": self.document, **self.values}
        with atomic_file(path) as stream:
            np.savez(stream, format=np.int64(FORMAT), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> PassResult:
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
            raise DataError(f"{path}: not a readable file of a pass ({error}); remove it and audit again") from error


@dataclass(frozen=True)
class Documents:
    """Some documents of a class."""

    numbers: Sequence[int]
    """Their ids."""
    tokens: Sequence[Ids]
    """Their token ids, each at least 2 and at most a block long."""


@dataclass(frozen=True)
class Tools:
    """What passes use beside the model and the documents."""

    settings: PassConfig
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
class Pass:
    """One further pass; ``run`` gives its columns for some documents, and is called by all ranks together."""

    name: str
    run: Callable[[Probe | None, Documents, Tools], dict[str, Floats]]
    settings: tuple[str, ...] = ()
    """Names of the settings that its columns depend on."""
    prefix: Side | None = None
    """The class whose documents it puts in front."""
    gradients: bool = False
    """Whether it needs gradients, and no probe."""


def lowercase_pass(probe: Probe | None, documents: Documents, tools: Tools) -> dict[str, Floats]:
    """Return the mean ``loss`` of each text and ``lower_loss`` of the same in lower case, each by its own tokens."""
    assert probe is not None
    losses = _means(probe.losses([*documents.tokens, *tools.lowercased(documents.tokens)]))
    n = len(documents.tokens)
    return {"loss": losses[:n], "lower_loss": losses[n:]}


def non_member_prefix_pass(probe: Probe | None, documents: Documents, tools: Tools) -> dict[str, Floats]:
    """Return the mean ``loss`` of each document's first tokens, and their ``conditional_loss`` after non-members."""
    return _conditional(probe, documents, tools, tools.prefixes["non_members"])


def member_prefix_pass(probe: Probe | None, documents: Documents, tools: Tools) -> dict[str, Floats]:
    """Return the mean ``loss`` of each document's first tokens, and their ``conditional_loss`` after members."""
    return _conditional(probe, documents, tools, tools.prefixes["members"])


def _conditional(probe: Probe | None, documents: Documents, tools: Tools, prefix: Ids) -> dict[str, Floats]:
    """Both means are over the same tokens: all but the first, which nothing predicts without a prefix."""
    assert probe is not None
    room = tools.block_length - prefix_budget(tools.settings, tools.block_length)
    heads = [tokens[:room] for tokens in documents.tokens]
    begins = 0 if tools.bos is None else 1  # the prefix has begun already
    losses = probe.losses([*heads, *(np.concatenate([prefix, head[begins:]]) for head in heads)])
    n = len(heads)
    after = [given[-(len(head) - 1) :] for head, given in zip(heads, losses[n:], strict=True)]
    return {"loss": _means(losses[:n]), "conditional_loss": _means(after)}


def neighbourhood_pass(probe: Probe | None, documents: Documents, tools: Tools) -> dict[str, Floats]:
    """Return the mean ``loss`` of each document and ``neighbour_loss``, that of its neighbours on average."""
    assert probe is not None
    originals = probe.candidates(documents.tokens, CANDIDATES)
    neighbours: list[Ids] = []
    for number, tokens, original in zip(documents.numbers, documents.tokens, originals, strict=True):
        draw = np.random.default_rng([tools.seed, number])
        neighbours += _neighbours(tokens, original["other"], original["weight"], tools, draw)
    losses = _means(probe.losses(neighbours))
    return {
        "loss": _means([original["loss"] for original in originals]),
        "neighbour_loss": losses.reshape(len(documents.tokens), tools.settings.neighbours).mean(axis=1),
    }


def _neighbours(
    tokens: Ids, other: NDArray[np.generic], weight: NDArray[np.generic], tools: Tools, draw: np.random.Generator
) -> list[Ids]:
    """Return copies of a document in which some tokens, never the first or the end token, are others."""
    places = 1 + np.flatnonzero(tokens[1:] != tools.eos)
    replaced = min(len(places), max(1, round(tools.settings.neighbour_share * len(places))))
    copies = []
    for _ in range(tools.settings.neighbours):
        copy = tokens.copy()
        for place in draw.choice(places, replaced, replace=False) if replaced else ():
            chances = weight[place - 1].astype(np.float64)
            copy[place] = draw.choice(other[place - 1], p=chances / chances.sum())
        copies.append(copy)
    return copies


def gradient_pass(probe: Probe | None, documents: Documents, tools: Tools) -> dict[str, Floats]:
    """Return ``norm``, the L2 norm of the gradient of each document's mean loss with respect to all parameters."""
    assert tools.gradient_norm is not None
    return {"norm": np.array([tools.gradient_norm(tokens) for tokens in documents.tokens], dtype=np.float64)}


_PREFIX = ("prefix_documents", "prefix_share")
PASSES = {
    each.name: each
    for each in (
        Pass("lowercase", lowercase_pass),
        Pass("non_member_prefix", non_member_prefix_pass, _PREFIX, prefix="non_members"),
        Pass("member_prefix", member_prefix_pass, _PREFIX, prefix="members"),
        Pass("neighbours", neighbourhood_pass, ("neighbours", "neighbour_share")),
        Pass("gradient", gradient_pass, gradients=True),
    )
}


def prefix_budget(settings: PassConfig, block_length: int) -> int:
    """Return how many tokens of a block a prefix may take: two at least are left to a document."""
    return min(int(settings.prefix_share * block_length), block_length - 2)


def choose_prefix(lengths: Mapping[int, int], budget: int, limit: int, seed: int) -> list[int]:
    """Return the documents of a class that make its prefix, in random order.

    Args:
        lengths: document id -> its tokens.
        budget: no further document is taken once there are so many tokens.
        limit: most documents; half of the class at most are taken.
        seed: of the order.
    """
    order = np.random.default_rng(seed).permutation(np.array(sorted(lengths), dtype=np.int64)).tolist()
    chosen: list[int] = []
    for document in order[: min(limit, len(order) // 2)]:
        if sum(lengths[taken] for taken in chosen) >= budget:
            break
        chosen.append(document)
    return chosen


def join_prefix(documents: Sequence[Ids], budget: int, *, bos: int | None, eos: int) -> Ids:
    """Return the texts of documents one after another, without the tokens between them, cut to ``budget`` tokens."""
    texts = [tokens[tokens != eos] if bos is None else tokens[(tokens != eos) & (tokens != bos)]
             for tokens in documents]  # fmt: skip
    begin = np.array([] if bos is None else [bos], dtype=np.int64)
    return np.concatenate([begin, *texts])[:budget]


def _means(losses: Sequence[NDArray[np.generic]]) -> Floats:
    return np.array([own.astype(np.float64).mean() for own in losses], dtype=np.float64)
