"""Documents of a split put together again from their blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dualtok.data.stream.blocks import BlockStream


class Piece(NamedTuple):
    """A piece of a document as it lies in a block."""

    ids: NDArray[np.int64]
    """Token ids [k]."""
    predicted: NDArray[np.bool_]
    """Whether each token has a loss [k]: all but the first, or those of them that are trained."""


def document_pieces(stream: BlockStream, documents: NDArray[np.int64], batch_size: int) -> dict[int, list[Piece]]:
    """Return the tokens of some documents of a split, in the order asked, each cut as it lies in its blocks.

    Args:
        stream: the split.
        documents: ids of documents [n].
        batch_size: blocks that are read at once.

    Returns:
        Document id -> its pieces.
    """
    found: dict[int, dict[int, Piece]] = {int(document): {} for document in documents}
    for batch, segments in stream.sequential(batch_size, documents=documents):
        has_label = (batch["labels"] != IGNORED_LABEL).numpy()
        for ids, labels, row in zip(batch["input_ids"].numpy(), has_label, segments, strict=True):
            ends = np.cumsum([piece.length for piece in row])
            for (document, start, length), end in zip(row, ends, strict=True):
                if document in found:
                    predicted = np.concatenate([np.zeros(1, dtype=np.bool_), labels[end - length : end - 1]])
                    found[document][start] = Piece(ids[end - length : end], predicted)
    return {document: [parts[start] for start in sorted(parts)] for document, parts in found.items()}
