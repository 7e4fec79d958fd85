"""Shards give back the blocks that were written, and say so when they cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualtok.data.packing import Block, pack_documents
from dualtok.data.shards import Shard, blocks_table, describe_shard, schema, write_shard
from dualtok.errors import DataError
from dualtok.files import file_sha256

if TYPE_CHECKING:
    from pathlib import Path

BLOCK_LENGTH = 16


def random_blocks(seed: int, documents: int = 30) -> list[Block]:
    """Return packed blocks of random documents; ids beyond int32 for documents, large ones for tokens."""
    draw = np.random.default_rng(seed)
    return pack_documents(
        [(2**40 + doc, draw.integers(0, 2**31 - 1, draw.integers(1, 50), dtype=np.int32)) for doc in range(documents)],
        BLOCK_LENGTH,
    )


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), documents=st.integers(1, 40))
def test_a_shard_gives_back_what_was_written(tmp_path: Path, seed: int, documents: int) -> None:
    blocks = random_blocks(seed, documents)
    entry = write_shard(tmp_path, 3, 7, blocks_table(blocks, BLOCK_LENGTH))
    assert entry.file == "shard-00003-00007.arrow"
    shard = Shard(tmp_path / entry.file)
    assert len(shard) == len(blocks) == entry.rows
    np.testing.assert_array_equal(shard.input_ids, np.stack([block.input_ids for block in blocks]))
    for row, block in enumerate(blocks):
        assert shard.segments(row) == block.segments
        assert shard.lengths(row).tolist() == [piece.length for piece in block.segments]


def test_the_entry_describes_the_file_on_disk(tmp_path: Path) -> None:
    blocks = random_blocks(1)
    table = blocks_table(blocks, BLOCK_LENGTH)
    entry = write_shard(tmp_path, 2, 0, table)
    path = tmp_path / entry.file
    assert (entry.lane, entry.stem) == (2, "shard-00002-00000")
    assert entry.bytes == path.stat().st_size
    assert entry.sha256 == file_sha256(path)
    assert entry.tokens == sum(piece.length for block in blocks for piece in block.segments)
    assert entry.tokens < entry.rows * BLOCK_LENGTH  # padding is not counted
    assert describe_shard(path, 2, table) == entry


def test_the_same_blocks_make_the_same_bytes(tmp_path: Path) -> None:
    table = blocks_table(random_blocks(1), BLOCK_LENGTH)
    # However the rows were gathered: a continued preparation reads them from other files.
    gathered = pa.concat_tables([table.slice(0, 5), table.slice(5)])
    first = write_shard(tmp_path / "a", 0, 0, table)
    second = write_shard(tmp_path / "b", 0, 0, gathered.cast(schema(BLOCK_LENGTH)))
    assert first == second


def test_rows_of_a_document_are_found_wherever_its_pieces_lie(tmp_path: Path) -> None:
    blocks = random_blocks(2)
    shard = Shard(tmp_path / write_shard(tmp_path, 0, 0, blocks_table(blocks, BLOCK_LENGTH)).file)
    for doc in {piece.doc for block in blocks for piece in block.segments}:
        expected = [row for row, block in enumerate(blocks) if doc in {piece.doc for piece in block.segments}]
        assert shard.rows_of(np.array([doc])).tolist() == expected
    assert shard.rows_of(np.array([1, 2, 3])).tolist() == []


def test_rows_are_mapped_not_copied(tmp_path: Path) -> None:
    entry = write_shard(tmp_path, 0, 0, blocks_table(random_blocks(3), BLOCK_LENGTH))
    before = pa.total_allocated_bytes()
    shard = Shard(tmp_path / entry.file)
    assert not shard.input_ids.flags.owndata
    assert not shard.input_ids.flags.writeable
    assert pa.total_allocated_bytes() - before < shard.input_ids.nbytes / 4


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "missing", "other table"])
def test_an_unreadable_shard_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / write_shard(tmp_path, 0, 0, blocks_table(random_blocks(4), BLOCK_LENGTH)).file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "other table":
        other = pa.table({"text": ["a"]})
        with pa.ipc.new_file(str(path), other.schema) as writer:
            writer.write_table(other)
    else:
        path.write_bytes({"garbage": b"x" * 500, "truncated": content[:-200], "empty": b""}[damage])
    with pytest.raises(DataError, match=rf"{path.name}: not a readable shard"):
        Shard(path)
