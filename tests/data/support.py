"""A prepared folder written directly, without tokenizer or corpus, whose tokens tell which block they are from."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from dualtok.config.data import DataConfig
from dualtok.data.manifest import DOCUMENTS, Manifest, SplitEntry, save_manifest
from dualtok.data.packing import Block, pack_documents
from dualtok.data.prepare.pipeline import DOCUMENT
from dualtok.data.shards import blocks_table, write_shard
from dualtok.files import file_sha256

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BLOCK_LENGTH = 8
SHARES = {"train": 0.5, "reference": 0.1, "attack_reference": 0.1, "auxiliary": 0.1, "validation": 0.1, "held_out": 0.1}


def whole_documents(blocks: int) -> list[tuple[int, np.ndarray]]:
    """Return documents of one full block each; document d consists of the token d + 1."""
    return [(doc, np.full(BLOCK_LENGTH, doc + 1, dtype=np.int32)) for doc in range(blocks)]


def write_prepared(
    folder: Path, documents: Sequence[tuple[int, np.ndarray]], *, lanes: int, rows_per_shard: int, seed: int = 0
) -> Path:
    """Write the split ``train`` of some token documents as ``prepare`` does: block j in lane j mod L."""
    blocks = pack_documents(documents, BLOCK_LENGTH)
    shards = []
    for lane in range(min(lanes, len(blocks))):
        mine: list[Block] = blocks[lane::lanes]
        for number, first in enumerate(range(0, len(mine), rows_per_shard)):
            table = blocks_table(mine[first : first + rows_per_shard], BLOCK_LENGTH)
            shards.append(write_shard(folder / "train", lane, number, table))
    table = pa.Table.from_pylist(
        [
            {
                "doc": doc,
                "sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
                "n_tokens": len(ids),
                "n_characters": 0,
                "zlib_bytes": 0,
            }
            for doc, ids in documents
        ],
        schema=DOCUMENT,
    )
    with pa.ipc.new_file(str(folder / "train" / DOCUMENTS), DOCUMENT) as writer:
        writer.write_table(table)
    tokens = sum(len(ids) for _, ids in documents)
    entry = SplitEntry(
        documents=len(documents),
        tokens=tokens,
        blocks=len(blocks),
        shards=shards,
        predicted_tokens=tokens - sum(len(block.segments) for block in blocks),
        documents_sha256=file_sha256(folder / "train" / DOCUMENTS),
    )
    manifest = Manifest(
        config={},
        seed=seed,
        tokenizer_fingerprint="none",
        vocabulary=len(documents) + 1,
        block_length=BLOCK_LENGTH,
        lanes=lanes,
        documents_read=len(documents),
        exact_duplicates=0,
        near_duplicates=0,
        too_short=0,
        unused=0,
        splits={"train": entry},
    )
    save_manifest(manifest, folder)
    return folder


def data_config(folder: Path, **changes: object) -> DataConfig:
    """Return a small ``data`` section with all six splits."""
    section: dict[str, object] = {
        "dir": str(folder),
        "block_length": 64,
        "lanes": 4,
        "vocab_size": 400,
        "shares": SHARES,
        **changes,
    }
    return DataConfig(**section)  # type: ignore[arg-type]  # pydantic checks the values
