"""The same blocks for three readers (dualtok's shards, MosaicML's MDS, Arrow files for ``datasets``), and the readers.

All give micro-batches of the same kind: torch int64 ``input_ids``, ``position_ids`` and ``labels``, documents apart.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader

from dualtok.data.folder import DataFolder
from dualtok.data.manifest import Manifest, ShardEntry, SplitEntry, load_manifest, save_manifest
from dualtok.data.packing import model_inputs, pack_documents
from dualtok.data.shards import Shard, blocks_table, shard_name, write_shard

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

Batch = dict[str, torch.Tensor]
LANES = 64
SHUFFLE_BUFFER = 10_000
VOCABULARY = 50_257
DOCUMENT_TOKENS = 5.5, 0.8
"""Mean and spread of the logarithm of a document's tokens: about 340 on average."""


def write_blocks(folder: Path, blocks: int, block_length: int) -> Path:
    """Write a prepared folder of packed random documents, of about 2,000 distinct blocks in random order.

    Args:
        folder: where to.
        blocks: a multiple of the 64 lanes.
        block_length: tokens per block.
    """
    draw = np.random.default_rng(0)
    distinct = min(blocks, 2048)
    lengths = np.minimum(draw.lognormal(*DOCUMENT_TOKENS, size=distinct * block_length // 300), block_length)
    documents = [(doc, draw.integers(1, VOCABULARY, int(n) + 1, dtype=np.int32)) for doc, n in enumerate(lengths)]
    table = blocks_table(pack_documents(documents, block_length), block_length)
    rows = min(1024, blocks // LANES)
    shards = [
        write_shard(folder / "train", number % LANES, number // LANES, table.take(draw.integers(0, len(table), rows)))
        for number in range(blocks // rows)
    ]
    _save_manifest(folder, shards, block_length)
    return folder


def link_blocks(prepared: Path, folder: Path, blocks: int) -> Path:
    """Write a prepared folder of at least so many blocks whose shards are hard links to another's, again and again."""
    manifest = load_manifest(prepared)
    sources = manifest.splits["train"].shards
    lane_blocks = LANES * sources[0].rows
    (folder / "train").mkdir(parents=True)
    shards = []
    for number in range(LANES * (-(-blocks // lane_blocks))):
        source = sources[number % len(sources)]
        lane = number % LANES
        shard = source.model_copy(update={"file": shard_name(lane, number // LANES), "lane": lane})
        os.link(prepared / "train" / source.file, folder / "train" / shard.file)
        shards.append(shard)
    _save_manifest(folder, shards, manifest.block_length)
    return folder


def _save_manifest(folder: Path, shards: list[ShardEntry], block_length: int) -> None:
    tokens = sum(shard.tokens for shard in shards)
    split = SplitEntry(
        documents=0,
        tokens=tokens,
        predicted_tokens=tokens,
        blocks=sum(shard.rows for shard in shards),
        shards=shards,
        documents_sha256="0" * 64,  # there is no table of documents; only audits read it
    )
    manifest = Manifest(
        config={},
        seed=0,
        tokenizer_fingerprint="none",
        vocabulary=VOCABULARY,
        block_length=block_length,
        lanes=LANES,
        documents_read=0,
        exact_duplicates=0,
        near_duplicates=0,
        too_short=0,
        unused=0,
        splits={"train": split},
    )
    save_manifest(manifest, folder)


def rows_of(prepared: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the blocks of each shard as rows of ``input_ids`` and ``lengths``, the tokens of each piece."""
    for entry in load_manifest(prepared).splits["train"].shards:
        shard = Shard(prepared / "train" / entry.file)
        yield [{"input_ids": shard.input_ids[row], "lengths": shard.lengths(row)} for row in range(len(shard))]


def write_mds(prepared: Path, folder: Path) -> None:
    """Write the blocks of a prepared folder as MosaicML's shards."""
    width = load_manifest(prepared).block_length
    columns = {"input_ids": f"ndarray:int32:{width}", "lengths": "ndarray:int32"}
    with mosaicml().MDSWriter(out=str(folder), columns=columns) as writer:
        for rows in rows_of(prepared):
            for row in rows:
                writer.write(row)


def write_arrow(prepared: Path, folder: Path) -> None:
    """Write the blocks of a prepared folder as the Arrow files that ``datasets`` streams, one per shard."""
    folder.mkdir(parents=True)
    width = load_manifest(prepared).block_length
    schema = pa.schema([("input_ids", pa.list_(pa.int32(), width)), ("lengths", pa.list_(pa.int32()))])
    for number, rows in enumerate(rows_of(prepared)):
        table = pa.Table.from_pylist(rows, schema=schema)
        with pa.ipc.new_stream(str(folder / f"{number:05d}.arrow"), schema) as writer:
            writer.write_table(table, max_chunksize=256)


def open_dualtok(prepared: Path, batch_size: int, workers: int) -> Iterator[Batch]:
    """Return dualtok's endless micro-batches."""
    return DataFolder(prepared).open("train", seed=0, verify=False).batches(0, batch_size, workers=workers)


def open_mosaicml(folder: Path, batch_size: int, workers: int) -> Iterator[Batch]:
    """Return StreamingDataset's, shuffled as it is by default (py1e) for one node."""
    dataset = mosaicml().StreamingDataset(
        local=str(folder),
        batch_size=batch_size,
        shuffle=True,
        shuffle_algo="py1e",
        shuffle_seed=0,
        num_canonical_nodes=1,
    )
    return _endless(dataset, batch_size, workers)


def open_datasets(folder: Path, batch_size: int, workers: int) -> Iterator[Batch]:
    """Return those of ``datasets``, streamed through a shuffle buffer; Arrow files and plain rows are its fastest."""
    from datasets import load_dataset

    files = sorted(str(path) for path in folder.glob("*.arrow"))
    dataset = load_dataset("arrow", data_files=files, split="train", streaming=True)
    return _endless(dataset.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER), batch_size, workers)


def _endless(dataset: Any, batch_size: int, workers: int) -> Iterator[Batch]:
    loader: Iterable[Batch] = DataLoader(
        dataset, batch_size=batch_size, num_workers=workers, collate_fn=_collate, persistent_workers=workers > 0
    )
    while True:
        yield from loader


def _collate(rows: list[dict[str, Any]]) -> Batch:
    ids = np.stack([np.asarray(row["input_ids"], dtype=np.int32) for row in rows])
    return model_inputs(ids, [np.asarray(row["lengths"], dtype=np.int32) for row in rows])


def mosaicml() -> Any:
    """Return MosaicML's ``streaming.base``.

    The package itself also imports its image and text datasets, which need torchvision and transformers 4.

    Raises:
        SystemExit: it is not installed.
    """
    if "streaming" not in sys.modules:
        found = importlib.util.find_spec("streaming")
        if found is None:
            raise SystemExit(
                "MosaicML's streaming is not installed; run `pip install --no-deps --target build/mosaicml "
                "--requirement requirements-bench.txt`, or leave it out with `--readers datasets`"
            )
        sys.modules["streaming"] = importlib.util.module_from_spec(found)
    return importlib.import_module("streaming.base")
