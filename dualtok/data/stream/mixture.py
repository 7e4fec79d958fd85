"""Several prepared folders as one stream, in stated shares, whose order depends on the seed alone.

Sample i belongs to lane i mod L, as in a stream of one folder, and a lane reads only the same lane of each source: each
shard keeps its one reading rank. Lane l gives its r-th sample (i = r L + l) to a source by a random pattern that is
drawn anew for each period of 1000 rounds and holds source k exactly quota_k times. The sample of source k is then its
lane's next one: period * quota_k + how often this period's pattern chose k before. Any sample is therefore found by one
look at one pattern; a source's lane begins its next epoch, in a new order, when it is used up, whatever the others do.
"""

from __future__ import annotations

from functools import lru_cache
from math import floor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dualtok.config.data import MIX_PERIOD
from dualtok.data.stream.blocks import BlockStream
from dualtok.data.stream.poisson import PoissonDocuments
from dualtok.data.stream.rank_batches import Batch, Fetches, RankBatches, rank_batches

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from dualtok.data.packing import Segment


PATTERN_SEED = 0x6D6978
"""Tells the patterns' random numbers from those of the streams."""


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Return how many of 1000 samples come from each source: rounded down, the rest by largest remainder.

    Args:
        weights: shares that sum to 1.
    """
    exact = [weight * MIX_PERIOD for weight in weights]
    whole = [floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(whole)), key=lambda source: whole[source] - exact[source])
    for source in by_remainder[: MIX_PERIOD - sum(whole)]:
        whole[source] += 1
    return tuple(whole)


class _Pattern(NamedTuple):
    source: NDArray[np.int16]
    """Which source each round of the period takes."""
    earlier: NDArray[np.int16]
    """How many earlier rounds of the period take the same."""


@lru_cache(maxsize=4096)
def _pattern(seed: int, quota: tuple[int, ...], lane: int, period: int) -> _Pattern:
    rounds = np.repeat(np.arange(len(quota), dtype=np.int16), quota)
    source = np.random.default_rng([seed, PATTERN_SEED, lane, period]).permutation(rounds)
    earlier = np.empty_like(source)
    for which, count in enumerate(quota):
        earlier[source == which] = np.arange(count)
    return _Pattern(source, earlier)


class Mixture:
    """The streams of several sources as one; what :class:`BlockStream` is to one folder.

    Evaluations read the first source alone: members are those of ``data.dir``.

    Args:
        streams: one per source, the main one first; of the same block length and lanes, none shorter than the lanes.
        weights: their shares of the samples, which sum to 1.
        seed: seed of the patterns.
    """

    def __init__(self, streams: Sequence[BlockStream], weights: Sequence[float], *, seed: int) -> None:
        self.streams, self.seed = list(streams), seed
        self.split, self.lanes, self.block_length = streams[0].split, streams[0].lanes, streams[0].block_length
        self.quotas = quotas(weights)
        assert len(self.quotas) == len(self.streams)
        assert all(stream.lanes == self.lanes <= len(stream) for stream in self.streams)

    def __len__(self) -> int:
        """Return the number of blocks of all sources."""
        return sum(len(stream) for stream in self.streams)

    def locate(self, sample: int) -> tuple[int, int]:
        """Return (source, its own sample) of a sample, both counted from 0."""
        rounds, lane = divmod(sample, self.lanes)
        period, position = divmod(rounds, MIX_PERIOD)
        pattern = _pattern(self.seed, self.quotas, lane, period)
        source = int(pattern.source[position])
        blocks = len(self.streams[source])
        position = period * self.quotas[source] + int(pattern.earlier[position])
        epoch, here = divmod(position, len(range(lane, blocks, self.lanes)))
        return source, epoch * blocks + here * self.lanes + lane

    def read(self, samples: Sequence[int]) -> Batch:
        """Return the batch of some samples, in their order."""
        positions = [self.locate(sample) for sample in samples]
        batch: Batch = {}
        for source, stream in enumerate(self.streams):
            rows = [row for row, (which, _) in enumerate(positions) if which == source]
            part = stream.read([positions[row][1] for row in rows]) if rows else {}
            for name, tensor in part.items():
                batch.setdefault(name, tensor.new_empty((len(positions), *tensor.shape[1:])))[rows] = tensor
        return batch

    def prefetch(self, samples: Sequence[int]) -> bool:
        """Begin to fetch what samples need that are read soon; see :meth:`BlockStream.prefetch`."""
        positions = [self.locate(sample) for sample in samples]
        more = [
            stream.prefetch([sample for which, sample in positions if which == source])
            for source, stream in enumerate(self.streams)
            if stream.is_remote
        ]
        return bool(more) and all(more)

    def forget_prefetched(self) -> None:
        """Begin a new search for what to fetch."""
        for stream in self.streams:
            stream.forget_prefetched()

    def fetches(self) -> Fetches:
        """Return what this reader has found of all sources' shards at an address so far."""
        return sum((stream.fetches() for stream in self.streams), Fetches())

    def batches(
        self, start_sample: int, global_micro_batch: int, rank: int = 0, world_size: int = 1, workers: int = 0
    ) -> RankBatches:
        """Yield this rank's share of each global micro-batch, without end; as :meth:`BlockStream.batches`."""
        return rank_batches(self, start_sample, global_micro_batch, rank=rank, world_size=world_size, workers=workers)

    def sequential(
        self,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        max_blocks: int | None = None,
        documents: NDArray[np.int64] | None = None,
    ) -> Iterator[tuple[Batch, list[list[Segment]]]]:
        """Yield the first source once in file order; see :meth:`BlockStream.sequential`."""
        return self.streams[0].sequential(batch_size, rank, world_size, max_blocks=max_blocks, documents=documents)


TrainingStream = BlockStream | Mixture | PoissonDocuments
"""What a run trains on: the split of one folder, or of several."""
