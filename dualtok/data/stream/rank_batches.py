"""One rank's share of each micro-batch, read by itself or by data workers, and what it needs soon fetched ahead.

A data worker reads and hands over several micro-batches at once, a window: a hand-over costs about a millisecond,
whatever its size. Windows grow from one micro-batch, so that the first step waits for no more than it needs.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from threading import Thread
from typing import Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dualtok.data.packing import Batch
from dualtok.errors import DataError, DualtokError

LOOK_AHEAD = 16
"""Windows that the search for shards to fetch goes on per window read."""
WINDOW_TOKENS = 2**17
"""Tokens of the largest window that holds more than one micro-batch; about 3 MB in shared memory."""
COUNTS = 3
"""Figures that each data worker keeps; see :class:`_RankWindows`."""


@dataclass(frozen=True)
class Fetches:
    """Shards at an address as they were opened."""

    opened: int = 0
    ready: int = 0
    """Of which lay on this host already, fetched ahead or kept from before."""

    def __add__(self, other: Fetches) -> Fetches:
        """Add both counts."""
        return Fetches(self.opened + other.opened, self.ready + other.ready)

    def __sub__(self, other: Fetches) -> Fetches:
        """Return what came after ``other``."""
        return Fetches(self.opened - other.opened, self.ready - other.ready)


class Reader(Protocol):
    """What reads samples by their numbers."""

    block_length: int

    def read(self, samples: Sequence[int]) -> Batch:
        """Return the batch of some samples, in their order."""

    def prefetch(self, samples: Sequence[int]) -> bool:
        """Begin to fetch what samples need that are read soon; return whether it is worth to look further ahead."""

    def forget_prefetched(self) -> None:
        """Begin a new search for what to fetch."""

    def fetches(self) -> Fetches:
        """Return what was found of shards at an address so far."""

    def __len__(self) -> int:
        """Return the samples of one epoch."""


def rank_batches(
    stream: Reader, start_sample: int, global_micro_batch: int, *, rank: int, world_size: int, workers: int
) -> RankBatches:
    """Yield one rank's share of each global micro-batch, without end; see
    :meth:`~dualtok.data.stream.blocks.BlockStream.batches`.

    Raises:
        DataError: the ranks do not divide the micro-batch.
    """
    if global_micro_batch % world_size:
        raise DataError(f"a micro-batch of {global_micro_batch} blocks cannot be shared by {world_size} ranks")
    share = global_micro_batch // world_size
    largest = max(1, WINDOW_TOKENS // (share * stream.block_length)) if workers else 1
    counts = torch.zeros(max(1, workers), COUNTS, dtype=torch.int64)
    if workers:
        counts.share_memory_()
    dataset = _RankWindows(
        stream, start_sample + rank * share, stride=global_micro_batch, share=share, largest=largest, counts=counts
    )
    windows: Iterable[Batch] = dataset
    if workers:
        windows = _from_workers(
            DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=_leave_notices_to_the_rank)
        )
    batches = chain.from_iterable(_micro_batches(window, share) for window in windows)
    return RankBatches(batches, counts, reads_ahead=workers > 0)


class RankBatches(Iterator[Batch]):
    """One rank's micro-batches, and how the reading ahead keeps up with their use.

    Args:
        batches: the micro-batches.
        counts: what each data worker has read, [workers, COUNTS]; see :class:`_RankWindows`.
        reads_ahead: whether there are data workers.
    """

    def __init__(self, batches: Iterator[Batch], counts: torch.Tensor, *, reads_ahead: bool) -> None:
        self._batches, self._counts, self.reads_ahead = batches, counts, reads_ahead
        self._yielded = 0
        self.waiting = 0
        """Micro-batches that lay read, summed over all times that one was asked for."""

    def __next__(self) -> Batch:
        """Return the next micro-batch, when it has been read."""
        self.waiting += self.depth
        batch = next(self._batches)
        self._yielded += 1
        return batch

    @property
    def depth(self) -> int:
        """Micro-batches that lie read now."""
        return max(0, int(self._counts[:, 0].sum()) - self._yielded)

    @property
    def yielded(self) -> int:
        """Times that a micro-batch was asked for and came."""
        return self._yielded

    def fetches(self) -> Fetches:
        """Return what this rank's readers, in their processes, have found of shards at an address so far."""
        _, opened, ready = self._counts.sum(0).tolist()
        return Fetches(opened, ready)


def _leave_notices_to_the_rank(_worker: int) -> None:
    """Let a worker outlive the signals that end a job, unless its rank sends them: schedulers send them to every
    process, and a rank that loses a worker fails before it has written its checkpoint."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_end_with_the_rank, args=(os.getppid(),), daemon=True).start()


def _end_with_the_rank(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os._exit(0)


def _from_workers(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Yield what workers read; their errors as if raised here, where the loader would show the worker's traceback."""
    try:
        yield from loader
    except DualtokError as error:
        last_line = str(error).rstrip().rpartition("\n")[2]
        raise type(error)(last_line.partition(": ")[2]) from None


def _micro_batches(window: Batch, rows: int) -> Iterator[Batch]:
    for first in range(0, len(window["input_ids"]), rows):
        yield {name: tensor[first : first + rows] for name, tensor in window.items()}


class _RankWindows(IterableDataset[Batch]):
    """The endless micro-batches of one rank, those of a window stacked; data worker w of W makes every W-th window.

    Args:
        stream: what reads.
        start: first sample of the rank.
        stride: samples from one of its micro-batches to the next.
        share: its samples of each.
        largest: micro-batches of the largest window.
        counts: in shared memory, [workers, COUNTS]: the micro-batches that each worker has read, the shards at an
            address that it has opened, and those of them that were there. Each worker writes its own row alone.
    """

    def __init__(
        self, stream: Reader, start: int, *, stride: int, share: int, largest: int, counts: torch.Tensor
    ) -> None:
        self._stream, self._start, self._stride, self._share, self._largest = stream, start, stride, share, largest
        self._counts = counts

    def __iter__(self) -> Iterator[Batch]:
        windows = self._windows()
        upcoming: deque[range] = deque()
        fetched = 0  # how many of them prefetch what they need
        self._stream.forget_prefetched()
        while True:
            for _ in range(LOOK_AHEAD):
                if fetched == len(upcoming):
                    upcoming.append(next(windows))
                window = upcoming[fetched]
                # Within an epoch of samples every shard has been seen.
                too_far = (window.start - upcoming[0].start) * self._stride >= len(self._stream)
                if too_far or not self._stream.prefetch(self._samples(window)):
                    break
                fetched += 1
            yield self._read(upcoming.popleft())
            fetched = max(0, fetched - 1)

    def _read(self, window: range) -> Batch:
        before = self._stream.fetches()
        batch = self._stream.read(self._samples(window))
        new, worker = self._stream.fetches() - before, get_worker_info()
        self._counts[0 if worker is None else worker.id] += torch.tensor([len(window), new.opened, new.ready])
        return batch

    def _windows(self) -> Iterator[range]:
        """Yield this worker's windows as the numbers of their micro-batches."""
        worker = get_worker_info()
        mine, every = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        first = 0
        for turn in count():
            window = range(first, first + min(1 + turn, self._largest))
            if turn % every == mine:
                yield window
            first = window.stop

    def _samples(self, window: range) -> list[int]:
        firsts = (self._start + number * self._stride for number in window)
        return [sample for first in firsts for sample in range(first, first + self._share)]
