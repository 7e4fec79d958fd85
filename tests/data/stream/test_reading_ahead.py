"""How the reading ahead keeps up: micro-batches that wait, and shards that are there when they are opened."""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING

import pytest

from dualtok.data.folder import DataFolder
from dualtok.data.remote.remote import RemoteFolder
from dualtok.data.stream.mixture import Mixture
from dualtok.data.stream.rank_batches import Fetches
from tests.data.remote.servers import fault_server, stream_config
from tests.data.support import whole_documents, write_prepared

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCKS, LANES, GLOBAL = 48, 4, 8
SHARDS = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_prepared(tmp_path / "prepared", whole_documents(BLOCKS), lanes=LANES, rows_per_shard=4)


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    with fault_server(folder) as server:
        yield server.url


def epoch(address: str, cache: Path, workers: int = 0, pause: float = 0.0, **settings: object) -> Fetches:
    """Read one epoch and return what was found of its shards."""
    stream = DataFolder(RemoteFolder(address, stream_config(cache, **settings))).open("train", seed=3)
    batches = stream.batches(0, GLOBAL, workers=workers)
    for _ in islice(batches, BLOCKS // GLOBAL):
        time.sleep(pause)
    return batches.fetches()


def test_a_cold_cache_has_nothing_and_a_warm_one_everything(address: str, tmp_path: Path) -> None:
    assert epoch(address, tmp_path / "cache", prefetch=0) == Fetches(opened=SHARDS, ready=0)
    assert epoch(address, tmp_path / "cache", prefetch=0) == Fetches(opened=SHARDS, ready=SHARDS)


def test_what_data_workers_find_is_counted_too(address: str, tmp_path: Path) -> None:
    cold, warm = (epoch(address, tmp_path / "cache", workers=2, prefetch=0) for _ in range(2))
    assert cold.opened >= SHARDS  # each worker opens its own, and reads beyond what was taken
    assert cold.ready < cold.opened
    assert warm.ready == warm.opened


def test_fetching_ahead_of_a_slow_reader_makes_shards_ready(address: str, tmp_path: Path) -> None:
    found = epoch(address, tmp_path / "cache", pause=0.2, prefetch=8)
    assert found.opened == SHARDS
    assert LANES <= found.ready < SHARDS, "all but those of the first micro-batches"


def test_a_mixture_counts_all_its_sources(address: str, folder: Path, tmp_path: Path) -> None:
    remote = DataFolder(RemoteFolder(address, stream_config(tmp_path / "cache", prefetch=0))).open("train", seed=3)
    batches = Mixture([DataFolder(folder).open("train", seed=3), remote], [0.5, 0.5], seed=0).batches(0, GLOBAL)
    for _ in islice(batches, 4 * BLOCKS // GLOBAL):
        pass
    found = batches.fetches()
    assert found.opened == remote.fetches().opened >= SHARDS
    assert found.ready == found.opened - SHARDS


def test_the_queue_is_full_for_a_slow_reader_and_empty_without_workers(folder: Path) -> None:
    stream = DataFolder(folder).open("train", seed=3)
    alone = stream.batches(0, GLOBAL)
    list(islice(alone, 5))
    assert (alone.reads_ahead, alone.waiting, alone.yielded) == (False, 0, 5)
    ahead = stream.batches(0, GLOBAL, workers=1)
    next(ahead)
    deadline = time.monotonic() + 30
    while ahead.depth < 5 and time.monotonic() < deadline:  # windows of 2 and 3 micro-batches: the loader keeps two
        time.sleep(0.01)
    before = ahead.waiting
    next(ahead)
    assert ahead.waiting - before == 5
    assert ahead.depth in (4, 4 + 4), "a window that was taken is replaced by the next one, of 4"
