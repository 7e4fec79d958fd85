"""Arrow IPC shards against Parquet: random micro-batches, sequential reading, and size on disk, with the same blocks.

A random micro-batch is what training reads: 8 rows, each from another shard. Arrow files are memory-mapped; of a
Parquet file the row's row group is read and decompressed. Both read files that the system has cached.

    python tools/bench_shards.py [--block-length 1024] [--rows 1024] [--row-group 64] [--pairs 15]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
from benchmark_support import paired, prepared_corpus, print_ratio

from dualtok.data.folder import DataFolder
from dualtok.data.packing import Block
from dualtok.data.prepare.staged import read_staged
from dualtok.data.shards import Shard, blocks_table, write_shard

if TYPE_CHECKING:
    from collections.abc import Callable

SHARDS = 8


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("block-length", 1024), ("rows", 1024), ("row-group", 64), ("batches", 20), ("pairs", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arrow, parquet = write_both(Path(folder), options.block_length, options.rows, options.row_group)
        draw = np.random.default_rng(0)
        batches = draw.integers(0, options.rows, (options.batches, SHARDS))
        shards = [Shard(path) for path in arrow]
        files = [pq.ParquetFile(path) for path in parquet]
        check_equal(shards, files, options.row_group, batches[0])

        def arrow_random() -> None:
            for rows in batches:
                np.stack([shard.input_ids[row] for shard, row in zip(shards, rows, strict=True)])

        def parquet_random() -> None:
            for rows in batches:
                np.stack([parquet_row(file, row, options.row_group) for file, row in zip(files, rows, strict=True)])

        def arrow_sequential() -> None:
            for path in arrow:
                Shard(path).input_ids.sum()  # mapped pages are read only when touched

        def parquet_sequential() -> None:
            for path in parquet:
                for batch in pq.ParquetFile(path).iter_batches(options.row_group, columns=["input_ids"]):
                    batch.column(0).flatten().to_numpy().sum()

        blocks = SHARDS * options.rows
        print(f"{SHARDS} shards of {options.rows} blocks of {options.block_length} tokens")
        random = paired(timed(parquet_random, options.batches), timed(arrow_random, options.batches), options.pairs)
        print_ratio("random micro-batch of 8, Parquet / Arrow", *random, "s")
        whole = paired(timed(parquet_sequential, blocks), timed(arrow_sequential, blocks), options.pairs)
        print_ratio("sequential reading per block, Parquet / Arrow", *whole, "s")
        sizes = [sum(path.stat().st_size for path in paths) / blocks for paths in (parquet, arrow)]
        print_ratio("size on disk per block, Parquet / Arrow", sizes[:1], sizes[1:], "bytes")


def write_both(folder: Path, block_length: int, rows: int, row_group: int) -> tuple[list[Path], list[Path]]:
    """Write the corpus' training blocks, repeated as needed, as shards of both kinds."""
    stream = DataFolder(prepared_corpus(folder, block_length).dir).open("train")
    blocks = [
        Block(ids.numpy().astype(np.int32), pieces)
        for batch, rows_pieces in stream.sequential(64)
        for ids, pieces in zip(batch["input_ids"], rows_pieces, strict=True)
    ]
    arrow, parquet = [], []
    for number in range(SHARDS):
        chosen = [blocks[(number * rows + row) % len(blocks)] for row in range(rows)]
        arrow.append(folder / write_shard(folder, number, 0, blocks_table(chosen, block_length)).file)
        parquet.append(arrow[-1].with_suffix(".parquet"))
        pq.write_table(read_staged(arrow[-1]), parquet[-1], compression="zstd", row_group_size=row_group)
    return arrow, parquet


def parquet_row(file: pq.ParquetFile, row: int, row_group: int) -> np.ndarray:
    """Return one block of a Parquet file."""
    group = file.read_row_group(int(row) // row_group, columns=["input_ids"])
    ids = group.column(0).chunk(0)
    return ids.flatten().to_numpy().reshape(len(ids), -1)[row % row_group]


def check_equal(shards: list[Shard], files: list[pq.ParquetFile], row_group: int, rows: np.ndarray) -> None:
    """Make sure that both give the same blocks."""
    for shard, file, row in zip(shards, files, rows, strict=True):
        np.testing.assert_array_equal(shard.input_ids[row], parquet_row(file, row, row_group))


def timed(work: Callable[[], None], items: int) -> Callable[[], float]:
    """Return a function that does the work and returns the seconds per item."""

    def measure() -> float:
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) / items

    return measure


if __name__ == "__main__":
    main()
