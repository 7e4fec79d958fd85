"""Shards: Arrow IPC files of blocks, memory-mapped, so that any row is read without its neighbors.

Chosen over Parquet by measurement (``tools/bench_shards.py``, figures in ``docs/results/data.md``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from dualtok.data.manifest import ShardEntry
from dualtok.data.packing import Block, Segment
from dualtok.data.remote.storage import BadShardError
from dualtok.files import atomic_file, file_sha256

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

SUFFIX = ".arrow"
SEGMENT = pa.struct([("doc", pa.int64()), ("start", pa.int32()), ("length", pa.int32())])


TRAINED = "trained"
"""Column, of shards with conversations alone, that says which tokens are trained."""


def schema(block_length: int, *, masked: bool = False) -> pa.Schema:
    """Return the columns of a shard: ``input_ids`` (a fixed-size list), ``segments`` and, if ``masked``, ``trained`` (a
    fixed-size list of booleans)."""
    columns = [("input_ids", pa.list_(pa.int32(), block_length)), ("segments", pa.list_(SEGMENT))]
    return pa.schema([*columns, (TRAINED, pa.list_(pa.bool_(), block_length))] if masked else columns)


def shard_name(lane: int, number: int) -> str:
    """Return the file name of a lane's ``number``-th shard."""
    return f"shard-{lane:05d}-{number:05d}{SUFFIX}"


def blocks_table(blocks: Sequence[Block], block_length: int) -> pa.Table:
    """Return blocks as an Arrow table, with masks if they have them."""
    flat = np.concatenate([block.input_ids for block in blocks]) if blocks else np.zeros(0, np.int32)
    ids = pa.FixedSizeListArray.from_arrays(pa.array(flat), block_length)
    offsets = np.concatenate([[0], np.cumsum([len(block.segments) for block in blocks])]).astype(np.int32)
    pieces = [piece for block in blocks for piece in block.segments]
    columns = [pa.array([piece[i] for piece in pieces], SEGMENT[i].type) for i in range(3)]
    segments = pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays(columns, fields=list(SEGMENT)))
    masks = [block.trained for block in blocks if block.trained is not None]
    if not masks:
        return pa.Table.from_arrays([ids, segments], schema=schema(block_length))
    trained = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(masks)), block_length)
    return pa.Table.from_arrays([ids, segments, trained], schema=schema(block_length, masked=True))


def write_shard(folder: Path, lane: int, number: int, table: pa.Table) -> ShardEntry:
    """Write a table of blocks as a shard, atomically, and return its manifest entry."""
    path = folder / shard_name(lane, number)
    with atomic_file(path) as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return describe_shard(path, lane, table)


def describe_shard(path: Path, lane: int, table: pa.Table) -> ShardEntry:
    """Return the manifest entry of a shard on disk that holds ``table``."""
    lengths = table.column("segments").combine_chunks().flatten().field("length")
    return ShardEntry(
        file=path.name,
        lane=lane,
        rows=table.num_rows,
        tokens=int(lengths.to_numpy(zero_copy_only=False).sum()),
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
    )


class Shard:
    """A memory-mapped shard.

    Args:
        path: the file.
        origin: what it is called in errors, when the file is a copy.

    Raises:
        BadShardError: the file is not an Arrow file of blocks.
    """

    def __init__(self, path: Path, origin: str | None = None) -> None:
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            ids, segments = only_chunk(table, "input_ids"), only_chunk(table, "segments")
            self.input_ids: NDArray[np.int32] = ids.flatten().to_numpy(zero_copy_only=True).reshape(len(ids), -1)
            self._trained = only_chunk(table, TRAINED).flatten() if TRAINED in table.column_names else None
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            reason = " ".join(str(error).split())[:120]
            raise BadShardError(f"{origin or path}: not a readable shard: {reason}") from None
        self._offsets = segments.offsets.to_numpy(zero_copy_only=False)
        pieces = segments.flatten()
        self._pieces = [pieces.field(name).to_numpy(zero_copy_only=False) for name in ("doc", "start", "length")]

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.input_ids)

    @property
    def is_masked(self) -> bool:
        """Whether it says which tokens are trained."""
        return self._trained is not None

    def trained(self, row: int) -> NDArray[np.bool_]:
        """Return whether each token of a block is trained; all are in a shard that does not say."""
        width = self.input_ids.shape[1]
        if self._trained is None:
            return np.ones(width, dtype=np.bool_)
        trained: NDArray[np.bool_] = self._trained.slice(row * width, width).to_numpy(zero_copy_only=False)
        return trained

    def lengths(self, row: int) -> NDArray[np.int32]:
        """Return the lengths of a block's pieces."""
        lengths: NDArray[np.int32] = self._pieces[2][self._offsets[row] : self._offsets[row + 1]]
        return lengths

    def segments(self, row: int) -> list[Segment]:
        """Return a block's pieces."""
        here = slice(self._offsets[row], self._offsets[row + 1])
        return [Segment(*map(int, piece)) for piece in zip(*(column[here] for column in self._pieces), strict=True)]

    def rows_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows that hold a piece of one of these documents, ascending."""
        hits = np.flatnonzero(np.isin(self._pieces[0], documents))
        return np.unique(np.searchsorted(self._offsets, hits, side="right") - 1)


def only_chunk(table: pa.Table, name: str) -> pa.Array:
    """Return a column as it lies in the file; ``combine_chunks`` would copy even a single chunk into memory."""
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
