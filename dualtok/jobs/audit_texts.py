"""What the audit reads of the documents themselves, beside what the models make of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.signals import Piece
from dualtok.audit.token_attacks import smoothed_frequencies
from dualtok.data.manifest import load_manifest
from dualtok.data.remote import prepared
from dualtok.data.stream import BlockStream
from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dualtok.data.packing import Segment
    from dualtok.run import RunConfig

    Pieces = list[NDArray[np.int64]]


def document_pieces(stream: BlockStream, documents: NDArray[np.int64], batch_size: int) -> dict[int, Pieces]:
    """Return the token ids of some documents of a split, in the order asked, each cut as it lies in its blocks."""
    found: dict[int, dict[int, NDArray[np.int64]]] = {int(document): {} for document in documents}
    for batch, segments in stream.sequential(batch_size, documents=documents):
        for ids, row in zip(batch["input_ids"].numpy(), segments, strict=True):
            for document, start, length, column in with_columns(row):
                if document in found:
                    found[document][start] = ids[column : column + length]
    return {document: [parts[start] for start in sorted(parts)] for document, parts in found.items()}


def predicted_ids(pieces: dict[int, Pieces]) -> dict[int, NDArray[np.int64]]:
    """Return the ids of each document's predicted tokens: the first one of a piece is none."""
    return {document: np.concatenate([part[1:] for part in parts]) for document, parts in pieces.items()}


def attacker_frequencies(run: RunConfig) -> NDArray[np.float64] | None:
    """Return each token id's smoothed share [v] of the predicted tokens of the attacker's corpus.

    That is the split ``attack_reference`` or, where the data has none or the audit is of it, ``reference``; None if
    neither will do.
    """
    manifest = load_manifest(prepared(run.data))
    taken = (run.audit.members, run.audit.non_members)
    split = next((s for s in ("attack_reference", "reference") if s in manifest.splits and s not in taken), None)
    if split is None or not manifest.splits[split].blocks:
        return None
    counts = np.zeros(manifest.vocabulary, dtype=np.int64)
    for batch, _ in BlockStream(prepared(run.data), split, seed=run.seed).sequential(run.audit.batch_size):
        labels = batch["labels"]
        counts += np.bincount(labels[labels != IGNORED_LABEL].numpy(), minlength=manifest.vocabulary)
    return smoothed_frequencies(counts)


def with_columns(row: list[Segment]) -> list[Piece]:
    """Add to each (document, start, length) of a block the column where it lies: pieces are laid end to end."""
    pieces, column = [], 0
    for document, start, length in row:
        pieces.append(Piece(document, start, length, column))
        column += length
    return pieces
