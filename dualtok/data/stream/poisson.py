"""Documents drawn by Poisson sampling, one truncated document per sample: what DP-SGD's accountant assumes.

Each document takes part in each step with the same probability, independently of all others. The draw is a function of
(seed, step) alone, so that a resumed run, on however many ranks, draws what it would have drawn.

Legend: n documents of one draw, t position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from dualtok.data.packing import PADDING_ID, model_inputs
from dualtok.errors import DataError
from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dualtok.data.packing import Segment
    from dualtok.data.stream.blocks import BlockStream
    from dualtok.data.stream.rank_batches import Batch

DRAW_SEED = 0x506F6973
"""Tells these random numbers from those of streams and noise."""


class _Position(NamedTuple):
    """Where a document's first piece lies."""

    file: str
    row: int
    column: int
    length: int
    cut: bool
    """Whether the document goes on after the piece."""


class PoissonDocuments:
    """Stands in for a stream of blocks: the training batches are drawn documents, all else is the stream's.

    Args:
        stream: blocks of the split, in a local folder.
        batch_size: documents expected per optimizer step, over all ranks.
        parts: pieces that each rank's draw is cut into, to bound memory.
        seed: of the draws.

    Raises:
        DataError: the split has fewer documents than ``batch_size``.
    """

    def __init__(self, stream: BlockStream, *, batch_size: int, parts: int, seed: int) -> None:
        self._stream, self._batch_size, self._parts, self._seed = stream, batch_size, parts, seed
        self.split, self.block_length = stream.split, stream.block_length
        self._positions = [position for _, position in sorted(_first_pieces(stream).items())]
        if len(self._positions) < batch_size:
            raise DataError(
                f"split {self.split!r} has {len(self._positions)} documents, fewer than train.batch_size={batch_size}; "
                "DP-SGD draws documents, not blocks: use a smaller batch"
            )

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._positions)

    @property
    def rate(self) -> float:
        """Probability with which a document takes part in a step."""
        return self._batch_size / len(self)

    @property
    def truncated(self) -> int:
        """Documents of which only the first ``block_length`` tokens are ever learned."""
        return sum(position.cut for position in self._positions)

    def drawn(self, step: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """Return which documents this rank learns in a step, counted from 0: every ``world_size``-th of those drawn."""
        draw = np.random.default_rng([DRAW_SEED, self._seed, step])
        return np.flatnonzero(draw.random(len(self)) < self.rate)[rank::world_size]

    def batches(
        self, start_sample: int, global_micro_batch: int, rank: int = 0, world_size: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """Yield this rank's documents without end, in ``parts`` batches per step; some may be empty.

        Args:
            start_sample: steps done times ``batch_size``.
            global_micro_batch: as for a stream; must be ``batch_size / parts``.
            rank: this rank.
            world_size: ranks.
            workers: has no effect: a draw touches few rows.
        """
        step = start_sample // (global_micro_batch * self._parts)
        while True:
            for part in np.array_split(self.drawn(step, rank, world_size), self._parts):
                yield self.read(part)
            step += 1

    def read(self, documents: NDArray[np.int64]) -> Batch:
        """Return the batch of some documents, each in a row of its own from column 0, padded [n, t]."""
        ids = np.full((len(documents), self.block_length), PADDING_ID, dtype=np.int32)
        labels = torch.full((len(documents), self.block_length), IGNORED_LABEL)
        lengths = []
        for row, document in enumerate(documents):
            position = self._positions[document]
            block = self._stream.read_rows(position.file, np.array([position.row]))
            piece = slice(position.column, position.column + position.length)
            ids[row, : position.length] = block["input_ids"][0, piece].numpy()
            labels[row, : position.length] = block["labels"][0, piece]
            lengths.append(np.array([position.length], dtype=np.int32))
        return {**model_inputs(ids, lengths), "labels": labels}

    def sequential(
        self,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        max_blocks: int | None = None,
        documents: NDArray[np.int64] | None = None,
    ) -> Iterator[tuple[Batch, list[list[Segment]]]]:
        """Yield the stream's blocks, for evaluation."""
        return self._stream.sequential(batch_size, rank, world_size, max_blocks=max_blocks, documents=documents)


def _first_pieces(stream: BlockStream) -> dict[int, _Position]:
    positions: dict[int, _Position] = {}
    going_on: set[int] = set()
    for file, rows in stream.shards():
        for row, pieces in enumerate(stream.pieces(file, np.arange(rows))):
            column = 0
            for document, start, length in pieces:
                if start == 0:
                    positions[document] = _Position(file, row, column, length, False)
                else:
                    going_on.add(document)
                column += length
    return {document: position._replace(cut=document in going_on) for document, position in positions.items()}
