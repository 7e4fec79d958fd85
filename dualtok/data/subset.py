"""Prepared folders made of some documents of another, without its texts: what shadow models are trained on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from dualtok.data.chat.encoding import learned
from dualtok.data.manifest import DOCUMENTS, MANIFEST, Manifest, SplitEntry, save_manifest
from dualtok.data.packing import pack_documents
from dualtok.data.shards import blocks_table, write_shard
from dualtok.data.stream.documents import document_pieces
from dualtok.data.tokenizer import FOLDER, save_tokenizer
from dualtok.errors import DataError
from dualtok.files import atomic_file, file_sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from dualtok.data.folder import DataFolder

READ_AT_ONCE = 64
"""Blocks."""


@dataclass(frozen=True)
class Subset:
    """Documents of one or more splits."""

    splits: Sequence[str]
    """Splits that they are taken from."""
    wants: Callable[[NDArray[np.int64]], NDArray[np.bool_]]
    """Whether each of some documents [n] is taken."""


def write_subset(
    data: DataFolder, folder: Path, subsets: Mapping[str, Subset], *, rows_per_shard: int, note: Mapping[str, Any]
) -> Manifest:
    """Pack some of a prepared folder's documents anew, into a prepared folder of their own.

    Documents keep their ids and token ids; they are packed as by ``dualtok prepare``, so that a block holds documents
    of the subset alone. The tokens of one split are in memory at a time. The manifest is written last.

    Args:
        data: the prepared folder.
        folder: where to write; what an interrupted call left there is removed.
        subsets: name of a split to write -> its documents.
        rows_per_shard: most blocks per shard.
        note: what the manifest's ``config`` has beside that of the source.

    Raises:
        DataError: the source lacks a split, a shard is missing or altered, or a subset is empty.
    """
    manifest = data.manifest
    shutil.rmtree(folder, ignore_errors=True)
    save_tokenizer(data.tokenizer, folder / FOLDER)
    entries = {split: _write_split(data, folder / split, subset, rows_per_shard) for split, subset in subsets.items()}
    made = manifest.model_copy(
        update={
            "config": {**manifest.config, **note},
            "splits": entries,
            "documents_read": sum(entry.documents for entry in entries.values()),
            "exact_duplicates": 0,
            "near_duplicates": 0,
            "too_short": 0,
            "unused": 0,
            "facts": None,
        }
    )
    save_manifest(made, folder)
    return made


def is_written(folder: Path) -> bool:
    """Return whether :func:`write_subset` came to its end there."""
    return (folder / MANIFEST).is_file()


def _write_split(data: DataFolder, folder: Path, subset: Subset, rows_per_shard: int) -> SplitEntry:
    manifest = data.manifest
    documents: list[tuple[int, NDArray[np.int32]]] = []
    trained: dict[int, NDArray[np.bool_]] | None = {} if manifest.is_masked else None
    tables = []
    for split in subset.splits:
        stream, table = data.open(split), data.documents(split)
        ids = table["doc"].to_numpy()
        wanted = subset.wants(ids)
        tables.append(table.filter(pa.array(wanted)))
        found = document_pieces(stream, ids[wanted], READ_AT_ONCE) if wanted.any() else {}
        for doc, pieces in found.items():
            documents.append((doc, np.concatenate([piece.ids for piece in pieces]).astype(np.int32)))
            if trained is not None:  # the first of a piece is never learned, and stays the first of one
                trained[doc] = np.concatenate([piece.predicted for piece in pieces])
    if not documents:
        raise DataError(f"{data}: too few documents in {' and '.join(subset.splits)} to draw some of them")
    table = pa.concat_tables(tables)
    shape = (rows_per_shard, manifest.block_length)
    return write_split(folder, documents, table, lanes=manifest.lanes, shape=shape, trained=trained)


def write_split(
    folder: Path,
    documents: Sequence[tuple[int, NDArray[np.int32]]],
    table: pa.Table,
    *,
    lanes: int,
    shape: tuple[int, int],
    trained: Mapping[int, NDArray[np.bool_]] | None = None,
) -> SplitEntry:
    """Pack documents and write them as one split.

    Args:
        folder: the split's.
        documents: id and token ids of each, at least one of them with tokens.
        table: one row per document; see :meth:`.folder.DataFolder.documents`.
        lanes: that the blocks are dealt to.
        shape: most blocks per shard, and tokens per block.
        trained: document -> whether each of its tokens is trained; None if all of all documents are.
    """
    rows_per_shard, block_length = shape
    blocks = pack_documents(documents, block_length, trained)
    shards = []
    for lane in range(min(lanes, len(blocks))):
        mine = blocks[lane::lanes]
        for number, first in enumerate(range(0, len(mine), rows_per_shard)):
            rows = blocks_table(mine[first : first + rows_per_shard], block_length)
            shards.append(write_shard(folder, lane, number, rows))
    path = folder / DOCUMENTS
    with atomic_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    count = sum(len(ids) for _, ids in documents)
    return SplitEntry(
        documents=len(documents),
        tokens=count,
        predicted_tokens=count - sum(len(block.segments) for block in blocks)
        if trained is None
        else sum(int(learned(own, block_length).sum()) for own in trained.values()),
        blocks=len(blocks),
        shards=shards,
        documents_sha256=file_sha256(path),
        largest_id=max(int(ids.max()) for _, ids in documents if len(ids)),
    )
