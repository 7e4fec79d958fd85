"""The order of the stream: a function of (seed, epoch) alone, whoever reads it and from wherever."""

from __future__ import annotations

import pickle
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualtok.data.folder import DataFolder
from dualtok.data.manifest import load_manifest
from dualtok.data.packing import Batch, pack_documents
from dualtok.errors import DataError
from tests.data.support import BLOCK_LENGTH, whole_documents, write_prepared

if TYPE_CHECKING:
    from dualtok.data.stream.blocks import BlockStream

BLOCKS, LANES, GLOBAL = 61, 8, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a split of 61 blocks in 8 lanes, so that lanes and shards are of unequal length."""
    return write_prepared(
        tmp_path_factory.mktemp("stream") / "prepared", whole_documents(BLOCKS), lanes=LANES, rows_per_shard=3
    )


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a split whose blocks hold several documents, some of them cut."""
    draw = np.random.default_rng(0)
    documents = [(3 * doc, draw.integers(1, 1000, draw.integers(1, 30), dtype=np.int32)) for doc in range(80)]
    return write_prepared(tmp_path_factory.mktemp("mixed") / "prepared", documents, lanes=4, rows_per_shard=5)


def numbers(batch: Batch) -> list[int]:
    """Return which blocks a batch of :func:`whole_documents` holds."""
    assert (batch["input_ids"] == batch["input_ids"][:, :1]).all()
    return (batch["input_ids"][:, 0] - 1).tolist()


def order(stream: BlockStream, epoch: int) -> list[int]:
    """Return the blocks of one epoch."""
    return numbers(stream.read(range(epoch * len(stream), (epoch + 1) * len(stream))))


def test_an_epoch_visits_each_block_once_and_differs_from_the_others(folder: Path) -> None:
    stream = DataFolder(folder).open("train", seed=3)
    assert len(stream) == BLOCKS
    epochs = [order(stream, epoch) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(BLOCKS)) for epoch in epochs)
    for number, epoch in enumerate(epochs):
        for other in epochs[:number]:
            assert sum(a != b for a, b in zip(epoch, other, strict=True)) > BLOCKS / 2


def test_rows_of_a_shard_come_in_another_order_each_epoch(tmp_path: Path) -> None:
    stream = DataFolder(write_prepared(tmp_path, whole_documents(40), lanes=2, rows_per_shard=20)).open(
        "train", seed=3, verify=False
    )
    assert len({tuple(order(stream, epoch)) for epoch in range(5)}) == 5
    lanes = [order(stream, 0)[lane::2] for lane in (0, 1)]
    assert [block // 2 for block in lanes[0]] != [block // 2 for block in lanes[1]]


def test_the_order_of_shards_and_that_of_rows_each_follow_the_seed_and_the_epoch(tmp_path: Path) -> None:
    """Either alone would make the whole order differ."""
    blocks, lanes = 240, 2
    folder = write_prepared(tmp_path, whole_documents(blocks), lanes=lanes, rows_per_shard=12)

    def orders(seed: int, epoch: int) -> tuple[list[str], list[tuple[str, list[int]]]]:
        """Return the shards of lane 0 in their order, and by name with their rows in theirs."""
        stream, rows = DataFolder(folder).open("train", seed=seed), dict[str, list[int]]()
        for sample in range(epoch * blocks, (epoch + 1) * blocks, lanes):
            _, file, row = stream.locate(sample)
            rows.setdefault(file, []).append(row)
        assert len(rows) == 10
        return list(rows), sorted(rows.items())

    (shards, rows), *others = (orders(seed, epoch) for seed, epoch in ((3, 0), (3, 1), (4, 0)))
    for other_shards, other_rows in others:
        assert other_shards != shards
        assert all(mine != others for mine, others in zip(rows, other_rows, strict=True))


def test_the_order_depends_on_the_seed_and_on_nothing_else(folder: Path) -> None:
    first = DataFolder(folder).open("train", seed=3)
    second = DataFolder(folder).open("train", seed=3, verify=False)
    expected = order(first, 2)
    order(second, 7)  # what was read before leaves no trace
    assert order(second, 2) == expected
    assert order(DataFolder(folder).open("train", seed=4), 2) != expected
    torch.manual_seed(0)
    np.random.seed(0)  # the global generators must not matter
    assert order(second, 2) == expected


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_the_same_global_micro_batches(folder: Path, world_size: int) -> None:
    steps = 3 * BLOCKS // GLOBAL
    whole = numbers(DataFolder(folder).open("train", seed=3).read(range(steps * GLOBAL)))
    ranks = [
        list(islice(DataFolder(folder).open("train", seed=3).batches(0, GLOBAL, rank, world_size), steps))
        for rank in range(world_size)
    ]
    for step in range(steps):
        slices = [numbers(batches[step]) for batches in ranks]
        assert {len(part) for part in slices} == {GLOBAL // world_size}
        assert list(chain.from_iterable(slices)) == whole[step * GLOBAL : (step + 1) * GLOBAL]


@pytest.mark.parametrize("start", [8, 56, 64, 8 * 1000])
def test_a_resumed_stream_is_the_tail_of_the_whole(folder: Path, start: int) -> None:
    stream = DataFolder(folder).open("train", seed=3)
    whole = islice(stream.batches(0, GLOBAL, 1, 2), start // GLOBAL, start // GLOBAL + 20)
    resumed = islice(DataFolder(folder).open("train", seed=3).batches(start, GLOBAL, 1, 2), 20)
    assert [numbers(batch) for batch in resumed] == [numbers(batch) for batch in whole]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(blocks=st.integers(1, 40), lanes=st.integers(1, 12), rows=st.integers(1, 7), seed=st.integers(0, 99))
def test_sample_i_comes_from_lane_i_mod_l(
    tmp_path_factory: pytest.TempPathFactory, blocks: int, lanes: int, rows: int, seed: int
) -> None:
    folder = write_prepared(tmp_path_factory.mktemp("lanes"), whole_documents(blocks), lanes=lanes, rows_per_shard=rows)
    stream = DataFolder(folder).open("train", seed=seed)
    lane_of = {shard.file: shard.lane for shard in load_manifest(folder).splits["train"].shards}
    seen = []
    for sample in range(2 * blocks):
        epoch, file, _ = stream.locate(sample)
        assert epoch == sample // blocks
        assert lane_of[file] == sample % blocks % lanes
        seen.append(stream.locate(sample))
    assert len(set(seen)) == 2 * blocks
    for epoch in (0, 1):
        assert sorted(order(stream, epoch)) == list(range(blocks))


def test_a_lane_finishes_a_shard_before_it_opens_the_next(folder: Path) -> None:
    stream = DataFolder(folder).open("train", seed=3)
    for lane in range(LANES):
        files = [stream.locate(sample)[1] for sample in range(lane, BLOCKS, LANES)]
        changes = sum(a != b for a, b in pairwise(files))
        assert changes == len(set(files)) - 1


def test_seeking_costs_no_replay(folder: Path) -> None:
    stream = DataFolder(folder).open("train", seed=3)
    for sample in (10**9, 10**15 + 7):  # a replay would take years
        epoch, file, row = stream.locate(sample)
        assert epoch == sample // BLOCKS
        assert numbers(stream.read([sample])) == [order(stream, epoch)[sample % BLOCKS]]
        assert (file, row) == stream.locate(sample)[1:]


def test_data_workers_change_neither_batches_nor_order(mixed_folder: Path) -> None:
    stream = DataFolder(mixed_folder).open("train", seed=3)
    stream.read([0])  # open maps stay behind when the stream goes to a worker
    plain = list(islice(stream.batches(8, 4, 1, 2), 40))
    for workers in (1, 2):
        batches = list(islice(stream.batches(8, 4, 1, 2, workers=workers), 40))
        for batch, expected in zip(batches, plain, strict=True):
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_a_stream_can_be_sent_to_another_process(folder: Path) -> None:
    stream = DataFolder(folder).open("train", seed=3)
    order(stream, 0)
    sent = pickle.dumps(stream)
    assert len(sent) < 20_000  # no blocks, no maps
    assert order(pickle.loads(sent), 1) == order(stream, 1)


def test_more_ranks_than_blocks_or_uneven_shares_are_refused(folder: Path) -> None:
    stream = DataFolder(folder).open("train", seed=3)
    with pytest.raises(DataError, match=r"'train' has 61 blocks, fewer than the job's 64 ranks"):
        stream.batches(0, 64, 0, 64)
    with pytest.raises(DataError, match=r"8 blocks cannot be shared by 3 ranks"):
        stream.batches(0, 8, 0, 3)
    with pytest.raises(DataError, match=r"without split 'held_out'.*data.shares"):
        DataFolder(folder).open("held_out", seed=3)


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (4, 2), (7, 4), (16, 8), (61, 2), (100, 3)])
def test_sequential_reads_each_block_once_and_all_ranks_make_equally_many_batches(
    folder: Path, batch_size: int, world_size: int
) -> None:
    stream = DataFolder(folder).open("train", seed=3)
    ranks = [list(stream.sequential(batch_size, rank, world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {stream.sequential_batches(batch_size, world_size)}
    read: list[int] = []
    for call in range(len(ranks[0])):
        for batches in ranks:
            batch, pieces = batches[call]
            assert len(pieces) == len(batch["input_ids"]) == batch_size, (
                "ZeRO-3 ranks would call layers unequally often"
            )
            real = [row for row in pieces if row]
            assert real == pieces[: len(real)]
            assert (batch["labels"][len(real) :] == -100).all()
            assert (batch["labels"][: len(real)] != -100).any(dim=1).all()
            assert [row[0].doc for row in real] == numbers(batch)[: len(real)]
            read += numbers(batch)[: len(real)]
    assert sorted(read) == list(range(BLOCKS))
    # File order: lane by lane, block j in lane j mod L.
    assert read == [block for lane in range(LANES) for block in range(lane, BLOCKS, LANES)]


def test_sequential_spreads_max_blocks_evenly(folder: Path) -> None:
    stream = DataFolder(folder).open("train", seed=3)
    whole = [block for batch, _ in stream.sequential(1) for block in numbers(batch)]
    for limit in (1, 5, BLOCKS, 1000):
        ranks = [list(stream.sequential(2, rank, 2, max_blocks=limit)) for rank in (0, 1)]
        assert len(ranks[0]) == len(ranks[1])
        read = [
            block
            for both in zip(*ranks, strict=True)
            for batch, pieces in both
            for block, row in zip(numbers(batch), pieces, strict=True)
            if row
        ]
        most = min(limit, BLOCKS)
        assert read == [whole[index * BLOCKS // most] for index in range(most)]


def test_sequential_reads_only_blocks_of_the_wanted_documents(mixed_folder: Path) -> None:
    stream = DataFolder(mixed_folder).open("train", seed=3)
    wanted = np.array([0, 9, 30, 3 * 79])
    rows = [row for _, pieces in stream.sequential(3, documents=wanted) for row in pieces if row]
    assert all({piece.doc for piece in row} & set(wanted.tolist()) for row in rows)
    everything = [row for _, pieces in stream.sequential(1) for row in pieces]
    assert rows == [row for row in everything if {piece.doc for piece in row} & set(wanted.tolist())]
    assert len(rows) < len(everything)
    found = {piece for row in rows for piece in row if piece.doc in wanted}
    lengths = dict(
        zip(*DataFolder(mixed_folder).documents("train").select(["doc", "n_tokens"]).to_pydict().values(), strict=True)
    )
    for doc in wanted.tolist():
        assert sum(piece.length for piece in found if piece.doc == doc) == lengths[doc]
    assert list(stream.sequential(3, documents=np.array([1]))) == []
    assert stream.sequential_batches(3, documents=np.array([1])) == 0


def test_batches_hold_the_very_tokens_of_the_documents(mixed_folder: Path) -> None:
    stream = DataFolder(mixed_folder).open("train", seed=3)
    draw = np.random.default_rng(0)
    documents = [(3 * doc, draw.integers(1, 1000, draw.integers(1, 30), dtype=np.int32)) for doc in range(80)]
    blocks = {tuple(block.input_ids.tolist()) for block in pack_documents(documents, BLOCK_LENGTH)}
    batch = stream.read(range(len(stream)))
    assert {tuple(row) for row in batch["input_ids"].tolist()} == blocks
    file, count = next((shard.file, shard.rows) for shard in load_manifest(mixed_folder).splits["train"].shards)
    rows = np.array([count - 1, 0])
    everything = stream.read_rows(file, np.arange(count))
    assert torch.equal(stream.read_rows(file, rows)["input_ids"], everything["input_ids"][rows])


@pytest.mark.parametrize("by_column", [False, True])
def test_reference_losses_come_with_their_tokens(folder: Path, by_column: bool) -> None:
    class Scores:
        def read(self, shard_stem: str, rows: np.ndarray) -> np.ndarray:
            lane, number = map(int, shard_stem.split("-")[1:])
            place = lane + 100.0 * number + 10000 * rows[:, None]
            columns = np.arange(BLOCK_LENGTH)  # beside the place they would be rounded away
            return (np.tile(columns, (len(rows), 1)) if by_column else place.repeat(BLOCK_LENGTH, 1)).astype(np.float16)

    stream = DataFolder(folder).open("train", seed=3, losses=Scores())
    for sample in range(0, 2 * BLOCKS, 7):
        _, file, row = stream.locate(sample)
        lane, number = map(int, Path(file).stem.split("-")[1:])
        loss = stream.read([sample])["reference_loss"]
        assert loss.dtype == torch.float32
        # The last token of a document predicts nothing.
        place = [float(np.float16(lane + 100.0 * number + 10000 * row))] * (BLOCK_LENGTH - 1)
        expected = [*(map(float, range(BLOCK_LENGTH - 1)) if by_column else place), 0.0]
        assert loss.tolist() == [expected]


def test_the_document_table_lists_each_document_and_notices_a_change(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path, whole_documents(5), lanes=2, rows_per_shard=2)
    table = DataFolder(folder).documents("train")
    assert table["doc"].to_pylist() == list(range(5))
    assert table["n_tokens"].to_pylist() == [BLOCK_LENGTH] * 5
    path = folder / "train" / "documents.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"documents\.arrow: missing or altered"):
        DataFolder(folder).documents("train")
    path.unlink()
    with pytest.raises(DataError, match=r"documents\.arrow: missing or altered"):
        DataFolder(folder).documents("train")


def test_readers_share_the_hashing_but_each_checks_every_size(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path, whole_documents(12), lanes=4, rows_per_shard=3)
    altered = folder / "train" / load_manifest(folder).splits["train"].shards[1].file
    content = bytearray(altered.read_bytes())
    content[len(content) // 2] ^= 1
    altered.write_bytes(content)
    DataFolder(folder).open("train", seed=0, verify_rank=0, verify_world_size=2)
    with pytest.raises(DataError, match=altered.name):
        DataFolder(folder).open("train", seed=0, verify_rank=1, verify_world_size=2)
    with pytest.raises(DataError, match=altered.name):
        DataFolder(folder).open("train")
    altered.write_bytes(content[:-8])
    with pytest.raises(DataError, match=altered.name):
        DataFolder(folder).open("train", seed=0, verify=False)
