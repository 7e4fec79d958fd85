"""Documents to fixed-length blocks, and blocks to model inputs.

A document longer than a block is cut only at multiples of the block length from its own start; whole pieces are then
packed into blocks. A document's losses therefore do not depend on its neighbors.

Legend: b batch, t position.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


PADDING_ID = 0
Batch = dict[str, torch.Tensor]
"""``input_ids``, ``position_ids`` and ``labels`` [b, t] and, where they are known, ``reference_loss`` [b, t]."""


class Segment(NamedTuple):
    """A piece of a document in a block; the pieces of a block lie end to end from column 0."""

    doc: int
    start: int
    """Offset of the piece in its document, a multiple of the block length."""
    length: int


@dataclass(frozen=True)
class Block:
    """One block of tokens, padded at its end."""

    input_ids: NDArray[np.int32]
    segments: list[Segment]
    trained: NDArray[np.bool_] | None = None
    """Whether each token is trained; None if all are."""


def cut(doc: int, length: int, block_length: int) -> list[Segment]:
    """Cut a document of ``length`` tokens into pieces of at most ``block_length``."""
    return [Segment(doc, start, min(block_length, length - start)) for start in range(0, length, block_length)]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins by best-fit decreasing; equal lengths keep their order, so the result is deterministic.

    Args:
        lengths: item sizes, each between 1 and ``capacity``.
        capacity: size of a bin.

    Returns:
        Item indices of each bin.
    """
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room left, bin), ascending: the first that fits is the best fit
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        position = bisect_left(open_bins, (lengths[item], -1))
        if position == len(open_bins):
            bins.append([item])
            free, which = capacity - lengths[item], len(bins) - 1
        else:
            free, which = open_bins.pop(position)
            bins[which].append(item)
            free -= lengths[item]
        if free:
            entry = (free, which)
            open_bins.insert(bisect_left(open_bins, entry), entry)
    return bins


def pack_documents(
    documents: Sequence[tuple[int, NDArray[np.int32]]],
    block_length: int,
    trained: Mapping[int, NDArray[np.bool_]] | None = None,
) -> list[Block]:
    """Pack documents into blocks; every token lands in exactly one of them.

    Args:
        documents: id and token ids of each.
        block_length: tokens per block.
        trained: document -> whether each of its tokens is trained; None if all of all documents are.
    """
    tokens = dict(documents)
    pieces = [piece for doc, ids in documents for piece in cut(doc, len(ids), block_length)]
    blocks = []
    for members in pack([piece.length for piece in pieces], block_length):
        input_ids = np.full(block_length, PADDING_ID, dtype=np.int32)
        mask = None if trained is None else np.zeros(block_length, dtype=np.bool_)
        column = 0
        for piece in (pieces[index] for index in members):
            here, there = slice(column, column + piece.length), slice(piece.start, piece.start + piece.length)
            input_ids[here] = tokens[piece.doc][there]
            if mask is not None and trained is not None:
                mask[here] = trained[piece.doc][there]
            column += piece.length
        blocks.append(Block(input_ids, [pieces[index] for index in members], mask))
    return blocks


def model_inputs(
    input_ids: NDArray[np.int32], lengths: Sequence[NDArray[np.int32]], trained: NDArray[np.bool_] | None = None
) -> dict[str, torch.Tensor]:
    """Return what a model takes: ids, positions and shifted labels.

    Args:
        input_ids: [b, t].
        lengths: for each row the lengths of its pieces, which lie end to end from column 0; the rest is padding.
        trained: whether each token is trained [b, t]; None if all are.

    Returns:
        ``input_ids``, ``position_ids`` (from 0 at each piece, and at the padding) and ``labels`` (the next token of the
        same piece if that is trained, else -100), all int64 [b, t].
    """
    rows, width = input_ids.shape
    counts = np.array([len(row_lengths) for row_lengths in lengths], dtype=np.int64)
    pieces = np.concatenate([np.zeros(0, np.int64), *lengths])
    filled = np.bincount(np.repeat(np.arange(rows), counts), weights=pieces, minlength=rows).astype(np.int64)
    # All rows as one: with its padding as a last piece each row has the same width, so pieces never cross rows.
    pieces = np.insert(pieces, np.cumsum(counts), width - filled)
    ends = np.cumsum(pieces)
    positions = np.arange(rows * width) - np.repeat(ends - pieces, pieces)
    labels = np.empty((rows, width), dtype=np.int64)
    labels[:, :-1] = input_ids[:, 1:]
    if trained is not None:
        labels[:, :-1][~trained[:, 1:]] = IGNORED_LABEL
    labels.reshape(-1)[ends - 1] = IGNORED_LABEL
    for row, first in enumerate(filled.tolist()):
        labels[row, first:] = IGNORED_LABEL
    return {
        "input_ids": torch.from_numpy(input_ids.astype(np.int64)),
        "position_ids": torch.from_numpy(positions.reshape(rows, width)),
        "labels": torch.from_numpy(labels),
    }


def pad_rows(batch: Batch, rows: int) -> Batch:
    """Fill a batch to ``rows`` blocks by repeating its first one, with all labels ignored."""
    missing = rows - len(batch["input_ids"])
    if missing <= 0:
        return batch
    filled = {name: torch.cat([tensor, tensor[:1].expand(missing, -1)]) for name, tensor in batch.items()}
    filled["labels"][-missing:] = IGNORED_LABEL
    return filled
