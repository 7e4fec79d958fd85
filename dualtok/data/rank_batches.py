"""One rank's share of each micro-batch, read by itself or by data workers, and what it needs soon fetched ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dualtok.errors import DataError

Batch = dict[str, torch.Tensor]
LOOK_AHEAD = 16
"""Micro-batches that the search for shards to fetch goes on per micro-batch read."""


class Reader(Protocol):
    """What reads samples by their numbers."""

    def read(self, samples: Sequence[int]) -> Batch:
        """Return the batch of some samples, in their order."""

    def prefetch(self, samples: Sequence[int]) -> bool:
        """Begin to fetch what samples need that are read soon; return whether it is worth to look further ahead."""

    def forget_prefetched(self) -> None:
        """Begin a new search for what to fetch."""

    def __len__(self) -> int:
        """Return the samples of one epoch."""


def rank_batches(
    stream: Reader, start_sample: int, global_micro_batch: int, *, rank: int, world_size: int, workers: int
) -> Iterator[Batch]:
    """Yield one rank's share of each global micro-batch, without end; see
    :meth:`~dualtok.data.stream.BlockStream.batches`."""
    if global_micro_batch % world_size:
        raise DataError(f"a micro-batch of {global_micro_batch} blocks cannot be shared by {world_size} ranks")
    dataset = _RankBatches(stream, start_sample, global_micro_batch, rank, global_micro_batch // world_size)
    if workers == 0:
        return iter(dataset)
    return iter(DataLoader(dataset, batch_size=None, num_workers=workers))


class _RankBatches(IterableDataset[Batch]):
    """The endless batches of one rank; data worker w of W makes every W-th."""

    def __init__(self, stream: Reader, start: int, global_micro_batch: int, rank: int, share: int) -> None:
        self._stream, self._start, self._stride = stream, start, global_micro_batch
        self._rank, self._share = rank, share

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, every = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        ahead = number
        self._stream.forget_prefetched()
        while True:
            ahead = max(ahead, number)
            for _ in range(LOOK_AHEAD):
                # Within an epoch of samples every shard has been seen.
                too_far = (ahead - number) * self._stride >= len(self._stream)
                if too_far or not self._stream.prefetch(self._samples(ahead)):
                    break
                ahead += every
            yield self._stream.read(self._samples(number))
            number += every

    def _samples(self, number: int) -> range:
        """Return this rank's samples of the ``number``-th micro-batch from the start."""
        first = self._start + number * self._stride + self._rank * self._share
        return range(first, first + self._share)
