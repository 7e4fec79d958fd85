"""Documents of a split put together again from their blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dualtok.data.stream.blocks import BlockStream


def document_pieces(
    stream: BlockStream, documents: NDArray[np.int64], batch_size: int
) -> dict[int, list[NDArray[np.int64]]]:
    """Return the token ids of some documents of a split, in the order asked, each cut as it lies in its blocks.

    Args:
        stream: the split.
        documents: ids of documents [n].
        batch_size: blocks that are read at once.

    Returns:
        Document id -> its pieces, each the int64 ids of one.
    """
    found: dict[int, dict[int, NDArray[np.int64]]] = {int(document): {} for document in documents}
    for batch, segments in stream.sequential(batch_size, documents=documents):
        for ids, row in zip(batch["input_ids"].numpy(), segments, strict=True):
            ends = np.cumsum([piece.length for piece in row])
            for (document, start, length), end in zip(row, ends, strict=True):
                if document in found:
                    found[document][start] = ids[end - length : end]
    return {document: [parts[start] for start in sorted(parts)] for document, parts in found.items()}
