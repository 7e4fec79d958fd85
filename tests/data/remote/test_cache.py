"""The host's cache: whole or absent, bounded, fetched once, and nothing that a killed process leaves is waited for."""

from __future__ import annotations

import hashlib
import mmap
import multiprocessing
import os
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest

from dualtok.data.remote.cache import ShardCache
from dualtok.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1000
pytestmark = pytest.mark.timeout(60)


def content(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


def name(number: int, size: int = SIZE) -> str:
    return hashlib.sha256(content(number, size)).hexdigest()


def read(cache: ShardCache, number: int, log: Path | None = None, size: int = SIZE) -> bytes:
    """Return a file by way of the cache; each real fetch adds its number to ``log``."""

    def fetch(part: Path) -> None:
        if log is not None:
            with log.open("a") as stream:
                stream.write(f"{number}\n")
        part.write_bytes(content(number, size))

    with cache.hold(name(number, size), size, fetch) as path:
        return path.read_bytes()


def forbidden(part: Path) -> None:
    raise AssertionError("fetched although it is there")


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"lock"}


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_file_is_fetched_once_for_all_who_use_the_folder(tmp_path: Path) -> None:
    first, second = ShardCache(tmp_path, 10**6, 10), ShardCache(tmp_path, 10**6, 10)
    assert read(first, 1) == content(1)
    for cache in (first, second):
        with cache.hold(name(1), SIZE, forbidden) as path:
            assert path.read_bytes() == content(1)
    assert kept(tmp_path) == {name(1)}


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE, 10)
    for number in (1, 2, 3):
        read(cache, number)
        os.utime(tmp_path / name(number), (number, number))
    read(cache, 1)  # used again: now 2 is the oldest
    read(cache, 4)
    assert kept(tmp_path) == {name(1), name(3), name(4)}
    assert total(tmp_path) <= 3 * SIZE


def test_a_limit_below_one_file_keeps_what_is_in_use_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(tmp_path, SIZE // 2, 10)
    for number in (1, 2, 3, 1):
        assert read(cache, number) == content(number)
        assert kept(tmp_path) == {name(number)}
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "data.stream.cache_gib" in told[0]


def test_a_file_stays_while_it_is_opened_and_its_map_outlives_it(tmp_path: Path) -> None:
    cache, other = ShardCache(tmp_path, SIZE, 10), ShardCache(tmp_path, SIZE, 10)
    read(cache, 1)
    with cache.hold(name(1), SIZE, forbidden) as path:
        read(other, 2)
        assert path.is_file(), "evicted while a reader was opening it"
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    read(other, 3)
    assert kept(tmp_path) == {name(3)}
    assert mapped[:] == content(1)


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10**6, 10)

    def fails(part: Path) -> None:
        part.write_bytes(content(1)[: SIZE // 2])
        raise DataError("gone")

    with pytest.raises(DataError, match="gone"), cache.hold(name(1), SIZE, fails):
        pass
    assert kept(tmp_path) == set()
    assert read(cache, 1) == content(1)


def test_a_cached_file_that_was_altered_is_fetched_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(ShardCache(tmp_path, 10**6, 10), 1)
    (tmp_path / name(1)).write_bytes(content(1)[:-1] + b"?")
    assert read(ShardCache(tmp_path, 10**6, 10), 1) == content(1)
    assert "the cached file was altered" in caplog.text


def _die_half_way(folder: Path, number: int) -> None:
    def fetch(part: Path) -> None:
        part.write_bytes(content(number)[: SIZE // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    with ShardCache(folder, 10**6, 10).hold(name(number), SIZE, fetch):
        pass


def test_a_killed_fetch_is_neither_believed_nor_waited_for_and_is_swept(tmp_path: Path) -> None:
    for number in (1, 2):
        process = multiprocessing.Process(target=_die_half_way, args=(tmp_path, number))
        process.start()
        process.join(20)
        assert process.exitcode == -signal.SIGKILL
    assert kept(tmp_path) == {f"{name(2)}.{SIZE}.part"}, "the second process did not sweep what the first one left"
    started = time.monotonic()
    assert read(ShardCache(tmp_path, 10**6, 60), 2) == content(2)
    assert time.monotonic() - started < 60, "it waited for the killed one"
    assert kept(tmp_path) == {name(2)}


def _hold_forever(folder: Path, begun: multiprocessing.SimpleQueue[int]) -> None:
    def fetch(part: Path) -> None:
        begun.put(1)
        time.sleep(60)

    with ShardCache(folder, 10**6, 10).hold(name(1), SIZE, fetch):
        pass


def test_a_fetch_that_makes_no_progress_is_waited_for_so_long_and_no_longer(tmp_path: Path) -> None:
    begun: multiprocessing.SimpleQueue[int] = multiprocessing.SimpleQueue()
    process = multiprocessing.Process(target=_hold_forever, args=(tmp_path, begun), daemon=True)
    process.start()
    begun.get()
    try:
        with pytest.raises(DataError, match=r"another process holds it without any progress"):
            read(ShardCache(tmp_path, 10**6, 0.3), 1)
        assert read(ShardCache(tmp_path, 10**6, 0.3), 2) == content(2), "other files are not held up"
    finally:
        process.kill()
        process.join(20)
    assert read(ShardCache(tmp_path, 10**6, 0.3), 1) == content(1)


def test_a_process_forked_during_a_fetch_does_not_inherit_the_lock(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, SIZE, 5)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,), daemon=True)

    def fetch(part: Path) -> None:
        child.start()
        part.write_bytes(content(1))

    with cache.hold(name(1), SIZE, fetch):
        pass
    try:
        read(cache, 2)
        assert kept(tmp_path) == {name(2)}, "what nobody uses any more could not be removed"
    finally:
        child.kill()


def _read_at_random(folder: Path, seed: int, limit: int, log: Path) -> None:
    draw = random.Random(seed)
    cache = ShardCache(folder, limit, 20)
    for _ in range(60):
        number = draw.randrange(6)
        if read(cache, number, log) != content(number):
            os._exit(1)


@pytest.mark.parametrize("limit", [SIZE // 2, 2 * SIZE, 100 * SIZE])
def test_many_processes_share_a_folder_of_any_size(tmp_path: Path, limit: int) -> None:
    folder, log = tmp_path / "cache", tmp_path / "log"
    processes = [
        multiprocessing.Process(target=_read_at_random, args=(folder, seed, limit, log), daemon=True)
        for seed in range(4)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 40
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        assert process.exitcode == 0, "hung, failed, or read something else"
    fetched = log.read_text().split()
    if limit == 100 * SIZE:
        assert sorted(fetched) == sorted(set(fetched)), "a file was fetched twice"
    read(ShardCache(folder, limit, 20), 99)
    assert total(folder) <= max(limit, SIZE)
    assert not [file for file in kept(folder) if file.endswith(".part")]


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"file/cache: .*data\.stream\.cache_dir"):
        read(ShardCache(tmp_path / "file" / "cache", 10**6, 1), 1)
