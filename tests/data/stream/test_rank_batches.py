"""Windows of micro-batches: whatever their size and the number of data workers, the same micro-batches come out."""

from __future__ import annotations

import os
import signal
import subprocess
from itertools import islice
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from dualtok.data.stream import rank_batches as module
from dualtok.data.stream.rank_batches import Batch, Fetches, rank_batches

if TYPE_CHECKING:
    from collections.abc import Sequence

GLOBAL, BLOCK_LENGTH, START = 6, 4, 18


class Recorder:
    """Gives each sample its number as its only content, and the number of samples that were read with it."""

    block_length = BLOCK_LENGTH

    def __init__(self, samples: int = 10**6) -> None:
        self._samples = samples
        self.calls: list[tuple[str, list[int]]] = []

    def read(self, samples: Sequence[int]) -> Batch:
        self.calls.append(("read", list(samples)))
        return {"input_ids": torch.tensor(samples)[:, None], "together": torch.full((len(samples), 1), len(samples))}

    def prefetch(self, samples: Sequence[int]) -> bool:
        self.calls.append(("prefetch", list(samples)))
        return True

    def forget_prefetched(self) -> None:
        self.calls.append(("forget", []))

    def fetches(self) -> Fetches:
        return Fetches()

    def __len__(self) -> int:
        return self._samples


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(("world_size", "tokens"), [(1, 1), (2, 30), (2, 10**6), (6, 13)])
def test_micro_batches_do_not_depend_on_windows_or_workers(
    monkeypatch: pytest.MonkeyPatch, workers: int, world_size: int, tokens: int
) -> None:
    monkeypatch.setattr(module, "WINDOW_TOKENS", tokens)
    share, rank = GLOBAL // world_size, world_size - 1
    stream = rank_batches(Recorder(), START, GLOBAL, rank=rank, world_size=world_size, workers=workers)
    batches = list(islice(stream, 30))
    expected = [
        [START + number * GLOBAL + rank * share + sample for sample in range(share)] for number in range(len(batches))
    ]
    assert [batch["input_ids"].flatten().tolist() for batch in batches] == expected
    together = [int(batch["together"][0]) // share for batch in batches]
    largest = max(1, tokens // (share * BLOCK_LENGTH)) if workers else 1
    # Of windows of 1, 2, 3, ... micro-batches up to the largest.
    sizes = [size for window in range(1, 31) for size in [min(window, largest)] * min(window, largest)]
    assert together == sizes[:30]


def test_a_worker_outlives_a_schedulers_notice_and_ends_with_its_rank() -> None:
    before = {child.pid for child in psutil.Process().children()}
    batches = rank_batches(Recorder(), 0, GLOBAL, rank=0, world_size=1, workers=1)
    list(islice(batches, 3))
    [worker] = [child for child in psutil.Process().children() if child.pid not in before]
    for name in ("-TERM", "-USR1"):  # by another process than the rank
        subprocess.run(["kill", name, str(worker.pid)], check=True)
    numbers = [int(batch["input_ids"][0]) for batch in islice(batches, 40)]
    assert numbers == list(range(3 * GLOBAL, 43 * GLOBAL, GLOBAL)), "the worker that was there read on"
    assert worker.is_running()
    os.kill(worker.pid, signal.SIGTERM)  # as multiprocessing does when the rank ends
    assert worker.wait(timeout=10) == 0


def test_what_is_read_soon_is_fetched_before_and_never_beyond_an_epoch() -> None:
    stream = Recorder(samples=10 * GLOBAL)
    list(islice(rank_batches(stream, 0, GLOBAL, rank=0, world_size=1, workers=0), 8))
    assert stream.calls.pop(0) == ("forget", [])
    reads = [samples[0] for what, samples in stream.calls if what == "read"]
    fetched = [samples[0] for what, samples in stream.calls if what == "prefetch"]
    assert reads == list(range(0, 8 * GLOBAL, GLOBAL))
    assert fetched == list(range(0, len(fetched) * GLOBAL, GLOBAL)), "each once, in the order of reading"
    ahead = 0
    for what, samples in stream.calls:
        if what == "prefetch":
            ahead = samples[0]
        else:
            assert ahead - samples[0] == 9 * GLOBAL, "an epoch of samples holds every shard"
