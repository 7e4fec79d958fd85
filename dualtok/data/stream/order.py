"""In which order a split's blocks are read: a function of (seed, epoch) alone.

Sample i of an epoch comes from lane i mod L. A lane visits its shards in a random order, and the rows of each shard in
a random order, so that a reader stays within one file for a while.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dualtok.data.manifest import ShardEntry


class Position(NamedTuple):
    """Where a sample is read."""

    epoch: int
    file: str
    """Its shard."""
    row: int


class BlockOrder:
    """Finds the block of any sample at the cost of a few permutations.

    Args:
        shards: of the split, in the order of the manifest.
        lanes: of the folder.
        seed: of the order.
    """

    def __init__(self, shards: Sequence[ShardEntry], lanes: int, *, seed: int) -> None:
        self.seed, self.lanes = seed, lanes
        self.blocks = sum(shard.rows for shard in shards)
        self._entries = {shard.file: shard for shard in shards}
        self._of_lane: list[list[ShardEntry]] = [[] for _ in range(lanes)]
        self._numbers: dict[str, int] = {}
        """Which shard of its lane a file is."""
        for shard in shards:
            self._numbers[shard.file] = len(self._of_lane[shard.lane])
            self._of_lane[shard.lane].append(shard)
        self._remember()

    def locate(self, sample: int) -> Position:
        """Return where a sample is read; samples are counted from 0 over all epochs."""
        epoch, file, position = self._shard_of(sample)
        return Position(epoch, file, int(self._row_order(epoch, file)[position]))

    def file_of(self, sample: int) -> str:
        """Return the shard of a sample; draws no order of rows."""
        return self._shard_of(sample)[1]

    def _shard_of(self, sample: int) -> tuple[int, str, int]:
        """Return (epoch, shard file, which of its rows in the epoch's order)."""
        epoch, index = divmod(sample, self.blocks)
        lane, position = index % self.lanes, index // self.lanes
        files, ends = self._lane_order(epoch, lane)
        which = int(np.searchsorted(ends, position, side="right"))
        first = int(ends[which - 1]) if which else 0
        return epoch, files[which], position - first

    def _draw_lane_order(self, epoch: int, lane: int) -> tuple[list[str], NDArray[np.int64]]:
        """Return a lane's shards in this epoch's order, and the positions in the lane at which each ends."""
        shards = self._of_lane[lane]
        order = np.random.default_rng([self.seed, epoch, lane]).permutation(len(shards))
        return [shards[i].file for i in order], np.cumsum([shards[i].rows for i in order])

    def _draw_row_order(self, epoch: int, file: str) -> NDArray[np.int64]:
        entry = self._entries[file]
        number = self._numbers[file]
        return np.random.default_rng([self.seed, epoch, entry.lane, number + 1]).permutation(entry.rows)

    def _remember(self) -> None:
        """Keep the orders that a reader goes back to: those of the shards that it is in."""
        self._lane_order = lru_cache(maxsize=4 * self.lanes)(self._draw_lane_order)
        self._row_order = lru_cache(maxsize=4 * self.lanes)(self._draw_row_order)

    def __getstate__(self) -> dict[str, object]:
        """Leave the caches behind."""
        return {**self.__dict__, "_lane_order": None, "_row_order": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take over another process's order."""
        self.__dict__.update(state)
        self._remember()
