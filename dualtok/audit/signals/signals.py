"""What one forward pass of a model leaves for all single-pass attacks: a few numbers per token, by document.

Legend: b batch, t position, n documents, k predicted tokens of all.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dualtok.audit.signals.files import AGAIN, Ragged, joined, read_ragged, write_ragged
from dualtok.audit.signals.ragged import segment_sum
from dualtok.errors import DataError
from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

TOKEN_DTYPES: dict[str, type[np.generic]] = {
    "log_prob": np.float32,
    "rank": np.int32,
    "mean_log_prob": np.float32,
    "var_log_prob": np.float32,
}


@dataclass(frozen=True, eq=False)
class Signals:
    """Per-token signals of one model over n documents; document i owns tokens ``offsets[i]:offsets[i + 1]``.

    Raises DataError if lengths or dtypes do not fit, a document occurs twice, or a value is not finite.
    """

    document: NDArray[np.int64]
    """Document ids [n], each once."""

    offsets: NDArray[np.int64]
    """Where each document's tokens start [n + 1], from 0 to k. A document may be empty: nothing of it was predicted."""

    log_prob: NDArray[np.float32]
    """log p of the true token [k], in nats."""

    rank: NDArray[np.int32]
    """Tokens of the vocabulary that were likelier than the true one [k]: 0 if none was. Equally likely ones do not
    count."""

    mean_log_prob: NDArray[np.float32]
    """Mean of log p over the vocabulary under p itself [k] (Zhang et al. 2024, mu)."""

    var_log_prob: NDArray[np.float32]
    """Variance of log p over the vocabulary under p itself [k] (Zhang et al. 2024, sigma squared)."""

    def __post_init__(self) -> None:
        """Check the arrays against each other."""
        problem = _shape_problem(self) or _value_problem(self)
        if problem:
            raise DataError(f"signals: {problem}")

    @property
    def n_documents(self) -> int:
        """Number of documents n."""
        return len(self.document)

    @property
    def n_tokens(self) -> int:
        """Number of predicted tokens k."""
        return len(self.log_prob)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Predicted tokens of each document [n]."""
        return np.diff(self.offsets)

    @property
    def top1(self) -> NDArray[np.bool_]:
        """Whether no token was likelier than the true one [k]."""
        top1: NDArray[np.bool_] = self.rank == 0
        return top1

    @property
    def mean_loss(self) -> NDArray[np.float64]:
        """Mean cross-entropy of each document [n], in nats per token.

        Raises:
            DataError: a document has no predicted token.
        """
        self.require_tokens()
        return -segment_sum(self.log_prob, self.offsets) / self.lengths

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy over all tokens of all documents (not a mean over documents).

        Raises:
            DataError: there is no token at all.
        """
        if self.n_tokens == 0:
            raise DataError("signals: no document has a predicted token, so no perplexity; give longer ones")
        with np.errstate(over="ignore"):
            return float(np.exp(-np.mean(self.log_prob, dtype=np.float64)))

    def require_tokens(self) -> None:
        """Raise DataError naming documents without a predicted token, if there are any."""
        empty = self.document[self.lengths == 0]
        if len(empty):
            raise DataError(
                f"signals: {len(empty)} documents have no predicted token (e.g. document {empty[0]}) and cannot be "
                "scored; leave them out with Signals.with_tokens()"
            )

    def with_tokens(self) -> Signals:
        """Return the documents that have at least one predicted token."""
        return self.take(np.flatnonzero(self.lengths > 0))

    def select(self, documents: Sequence[int] | NDArray[np.int64]) -> Signals:
        """Return the given documents, in the given order.

        Raises:
            DataError: a document is not among these, or is asked for twice.
        """
        wanted = np.asarray(documents, dtype=np.int64)
        if np.array_equal(wanted, self.document):
            return self
        by_id = np.argsort(self.document)
        position = np.searchsorted(self.document, wanted, sorter=by_id)
        found = np.zeros(len(wanted), dtype=bool)
        inside = position < self.n_documents
        found[inside] = self.document[by_id[position[inside]]] == wanted[inside]
        if not found.all():
            raise DataError(
                f"signals: {np.count_nonzero(~found)} documents are missing (e.g. document {wanted[~found][0]}); "
                "both models must be run over the same documents"
            )
        return self.take(by_id[position])

    def take(self, positions: NDArray[np.int64]) -> Signals:
        """Return the documents at the given positions (not ids)."""
        lengths = self.lengths[positions]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        source = np.repeat(self.offsets[:-1][positions] - offsets[:-1], lengths) + np.arange(offsets[-1])
        arrays = {name: getattr(self, name)[source] for name in TOKEN_DTYPES}
        return Signals(document=self.document[positions], offsets=offsets, **arrays)

    def save(self, path: str | Path) -> None:
        """Write one Parquet file that is either whole or absent, one row per document."""
        values = {name: getattr(self, name) for name in TOKEN_DTYPES}
        write_ragged(path, Ragged(self.document, self.offsets, values))

    @classmethod
    def load(cls, path: str | Path) -> Signals:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: the file is missing, torn, of another format, or its values do not fit each other.
        """
        return cls._of(path, joined(list(read_ragged(path, TOKEN_DTYPES)), TOKEN_DTYPES))

    @classmethod
    def stream(cls, path: str | Path) -> Iterator[Signals]:
        """Yield what :meth:`save` wrote some documents at a time, about a million tokens; all together never.

        Raises:
            DataError: as :meth:`load`, but that a document occurs twice is noticed within such a part alone.
        """
        for group in read_ragged(path, TOKEN_DTYPES):
            yield cls._of(path, group)

    @classmethod
    def stream_pairs(cls, path: str | Path, reference: str | Path) -> Iterator[tuple[Signals, Signals]]:
        """Yield the parts of :meth:`stream` of two models' files of the same documents, side by side.

        Raises:
            DataError: as :meth:`stream`, or the files hold other documents or lengths.
        """
        for part, other in zip_longest(cls.stream(path), cls.stream(reference)):
            same = part is not None and other is not None and np.array_equal(part.document, other.document)
            if not same or not np.array_equal(part.offsets, other.offsets):
                raise DataError(f"{path} and {reference} are of other documents or lengths; {AGAIN}")
            yield part, other

    @classmethod
    def _of(cls, path: str | Path, ragged: Ragged) -> Signals:
        values: dict[str, Any] = ragged.values
        try:
            return cls(document=ragged.document, offsets=ragged.offsets, **values)
        except DataError as error:
            raise DataError(f"{path}: {error}; {AGAIN}") from error


def _shape_problem(signals: Signals) -> str | None:
    dtypes: dict[str, type[np.generic]] = {"document": np.int64, "offsets": np.int64, **TOKEN_DTYPES}
    for name, dtype in dtypes.items():
        array = getattr(signals, name)
        if array.dtype != dtype or array.ndim != 1:
            return f"{name} is {array.dtype} with shape {array.shape}, expected one dimension of {np.dtype(dtype)}"
    offsets = signals.offsets
    if len(offsets) != signals.n_documents + 1:
        return f"{len(offsets)} offsets for {signals.n_documents} documents, expected one more than documents"
    if offsets[0] != 0 or offsets[-1] != signals.n_tokens or (np.diff(offsets) < 0).any():
        return f"offsets do not rise from 0 to the {signals.n_tokens} tokens"
    for name in TOKEN_DTYPES:
        if len(getattr(signals, name)) != signals.n_tokens:
            return f"{name} has {len(getattr(signals, name))} tokens, log_prob has {signals.n_tokens}"
    return None


def _value_problem(signals: Signals) -> str | None:
    if len(np.unique(signals.document)) != signals.n_documents:
        return "a document occurs twice"
    for name in ("log_prob", "mean_log_prob", "var_log_prob"):
        bad = np.flatnonzero(~np.isfinite(getattr(signals, name)))
        if len(bad):
            document = signals.document[np.searchsorted(signals.offsets, bad[0], side="right") - 1]
            return (
                f"{name} of document {document} is not finite; the model has diverged or its logits overflow (try fp32)"
            )
    negative = [name for name in ("rank", "var_log_prob") if (getattr(signals, name) < 0).any()]
    return f"{negative[0]} is negative" if negative else None


class PlacedSegment(NamedTuple):
    """Where a piece of a document lies in a row of packed blocks."""

    document: int
    start: int
    """Offset of the piece's first token in its document."""
    length: int
    """Tokens of the piece. Its last one predicts nothing."""
    column: int
    """Column of the piece's first token in the row."""


class SignalsBuilder:
    """Puts documents together again whose pieces come from several blocks, in any order.

    Picklable, so that ranks can send theirs to one of them and :meth:`merge` them there.

    Args:
        n_tokens: the documents wanted and the tokens each has. Pieces of others are passed over, and :meth:`build`
            demands that every document is whole. None takes all documents and cannot notice a missing last piece.
        dtypes: name -> dtype of what there is of each token; other than those of :class:`Signals` for
            :meth:`build_ragged` alone.
    """

    def __init__(
        self, n_tokens: Mapping[int, int] | None = None, dtypes: Mapping[str, type[np.generic]] = TOKEN_DTYPES
    ) -> None:
        self._dtypes = dict(dtypes)
        self._n_tokens = None if n_tokens is None else dict(n_tokens)
        self._pieces: dict[int, dict[int, tuple[int, dict[str, NDArray[np.generic]]]]] = defaultdict(dict)

    def add(
        self, signals: Mapping[str, torch.Tensor], labels_bt: torch.Tensor, segments: Sequence[Sequence[PlacedSegment]]
    ) -> None:
        """Take one batch: signals of each token [b, t] (:mod:`.from_logits`), and each row's pieces.

        Raises:
            ValueError: pieces do not fit the rows, or a label reaches over a piece's end.
            DataError: a piece was added before.
        """
        rows, width = labels_bt.shape
        if len(segments) != rows:
            raise ValueError(f"{len(segments)} lists of pieces for {rows} rows")
        keep = (labels_bt != IGNORED_LABEL).cpu().numpy()
        arrays = {name: signals[name].cpu().numpy().astype(dtype) for name, dtype in self._dtypes.items()}
        for row, pieces in enumerate(segments):
            for document, start, length, column in pieces:
                if length < 1 or column < 0 or column + length > width:
                    raise ValueError(f"document {document}: piece of {length} at column {column} of {width}")
                if keep[row, column + length - 1]:
                    raise ValueError(f"document {document}: the last token of its piece at {start} has a label")
                if self._n_tokens is not None and document not in self._n_tokens:
                    continue
                here = keep[row, column : column + length]
                values = {name: array[row, column : column + length][here] for name, array in arrays.items()}
                self._insert(int(document), int(start), int(length), values)

    def merge(self, other: SignalsBuilder) -> None:
        """Take the pieces of another builder, e.g. another rank's.

        Raises:
            DataError: both hold the same piece.
        """
        for document, pieces in other._pieces.items():
            for start, (length, values) in pieces.items():
                self._insert(document, start, length, values)

    def build(self) -> Signals:
        """Return the documents in the order of their ids; see :meth:`build_ragged`.

        Raises:
            DataError: a piece is missing or overlaps another, or a value is not finite.
        """
        ragged = self.build_ragged()
        values: dict[str, Any] = ragged.values
        return Signals(document=ragged.document, offsets=ragged.offsets, **values)

    def build_ragged(self) -> Ragged:
        """Return the documents in the order of their ids, with whatever there is of each token.

        Raises:
            DataError: a piece is missing or overlaps another.
        """
        wanted = sorted(self._pieces if self._n_tokens is None else self._n_tokens)
        chunks: dict[str, list[NDArray[np.generic]]] = {
            name: [np.zeros(0, dtype)] for name, dtype in self._dtypes.items()
        }
        offsets = [0]
        for document in wanted:
            pieces = sorted(self._pieces.get(document, {}).items())
            end = predicted = 0
            for start, (length, values) in pieces:
                if start != end:
                    raise DataError(_broken(document, f"a piece starts at token {start}, expected {end}"))
                end += length
                predicted += len(next(iter(values.values())))
                for name, array in values.items():
                    chunks[name].append(array)
            if self._n_tokens is not None and end != self._n_tokens[document]:
                raise DataError(_broken(document, f"{end} tokens were read of {self._n_tokens[document]}"))
            offsets.append(offsets[-1] + predicted)
        arrays = {name: np.concatenate(parts) for name, parts in chunks.items()}
        return Ragged(np.array(wanted, np.int64), np.array(offsets, np.int64), arrays)

    def _insert(self, document: int, start: int, length: int, values: dict[str, NDArray[np.generic]]) -> None:
        if start in self._pieces[document]:
            raise DataError(_broken(document, f"its piece at token {start} came twice"))
        self._pieces[document][start] = (length, values)


def merged(parts: Sequence[SignalsBuilder] | None) -> SignalsBuilder | None:
    """Return all ranks' pieces in one builder, the first; None where there are no parts, i.e. not on rank 0."""
    if parts is None:
        return None
    for other in parts[1:]:
        parts[0].merge(other)
    return parts[0]


def _broken(document: int, what: str) -> str:
    return f"signals: document {document}: {what}; check the shards or run `dualtok prepare` again"


def collect(
    batches: Iterable[tuple[Mapping[str, torch.Tensor], torch.Tensor, Sequence[Sequence[PlacedSegment]]]],
    n_tokens: Mapping[int, int] | None = None,
) -> Signals:
    """Return the documents of batches ``(signals, labels_bt, segments)``; see :class:`SignalsBuilder`."""
    builder = SignalsBuilder(n_tokens)
    for signals, labels_bt, segments in batches:
        builder.add(signals, labels_bt, segments)
    return builder.build()
