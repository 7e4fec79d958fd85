"""A split's blocks as a stream whose order depends on (seed, epoch) alone, not on ranks, workers or where it was
resumed.

Sample i of an epoch comes from lane i mod L. A lane visits its shards in a random order, and the rows of each shard in
a random order, so that a reader stays within one file for a while. Rank r takes the contiguous slice r of each global
micro-batch. The position in the stream is one integer, the samples seen; seeking to it costs a few permutations, not a
replay.

Legend: b batch, t position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dualtok.data.manifest import ShardEntry, check_shard, load_manifest, split_entry
from dualtok.data.packing import Segment, model_inputs
from dualtok.data.shards import Shard
from dualtok.errors import DataError
from dualtok.files import file_sha256
from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from numpy.typing import NDArray

Batch = dict[str, torch.Tensor]
DOCUMENTS = "documents.arrow"


class Scores(Protocol):
    """Reference losses of a split's shards."""

    def read(self, shard_stem: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the losses [len(rows), t] of some rows of a shard."""


def pad_rows(batch: Batch, rows: int) -> Batch:
    """Fill a batch to ``rows`` blocks by repeating its first one, with all labels ignored."""
    missing = rows - len(batch["input_ids"])
    if missing <= 0:
        return batch
    filled = {name: torch.cat([tensor, tensor[:1].expand(missing, -1)]) for name, tensor in batch.items()}
    filled["labels"][-missing:] = IGNORED_LABEL
    return filled


class BlockStream:
    """Blocks of one split, memory-mapped.

    Args:
        data_dir: a prepared folder.
        split: one of its splits.
        seed: seed of the order.
        scores: reference losses; batches then have ``reference_loss``.
        verify: whether to compare the shards' SHA-256 with the manifest on opening.
        verify_rank: this reader among those that share that work; each hashes every ``verify_world_size``-th shard.
        verify_world_size: readers that open the same split at once.

    Raises:
        DataError: the split does not exist, or a shard is missing, truncated or altered.
    """

    def __init__(
        self, data_dir: str | Path, split: str, *, seed: int, scores: Scores | None = None, verify: bool = True,
        verify_rank: int = 0, verify_world_size: int = 1,
    ) -> None:  # fmt: skip
        manifest = load_manifest(data_dir)
        entry = split_entry(manifest, split, data_dir)
        self.split, self.seed = split, seed
        self.block_length, self.lanes = manifest.block_length, manifest.lanes
        self._blocks = entry.blocks
        self._folder = Path(data_dir) / split
        self._documents_sha256 = entry.documents_sha256
        self._scores = scores
        self._entries = {shard.file: shard for shard in entry.shards}
        self._lane_shards: list[list[ShardEntry]] = [[] for _ in range(self.lanes)]
        for number, shard in enumerate(entry.shards):
            mine = verify and number % verify_world_size == verify_rank
            check_shard(self._folder / shard.file, shard, hashed=mine)
            self._lane_shards[shard.lane].append(shard)
        self._open: dict[str, Shard] = {}
        self._lane_order = lru_cache(maxsize=4 * self.lanes)(self._draw_lane_order)
        self._row_order = lru_cache(maxsize=4 * self.lanes)(self._draw_row_order)

    def __len__(self) -> int:
        """Return the number of blocks, the samples of one epoch."""
        return self._blocks

    def locate(self, sample: int) -> tuple[int, str, int]:
        """Return (epoch, shard file, row) of a sample, counted from 0 over all epochs."""
        epoch, index = divmod(sample, self._blocks)
        lane, position = index % self.lanes, index // self.lanes
        files, ends = self._lane_order(epoch, lane)
        which = int(np.searchsorted(ends, position, side="right"))
        first = int(ends[which - 1]) if which else 0
        return epoch, files[which], int(self._row_order(epoch, files[which])[position - first])

    def read(self, samples: Sequence[int]) -> Batch:
        """Return the batch of some samples, in their order."""
        places = [self.locate(sample)[1:] for sample in samples]
        return self._read_places(places)[0]

    def read_rows(self, shard_file: str, rows: NDArray[np.int64]) -> Batch:
        """Return the batch of some rows of one shard."""
        return self._read_places([(shard_file, int(row)) for row in rows])[0]

    def batches(
        self, start_sample: int, global_micro_batch: int, rank: int = 0, world_size: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """Yield this rank's share of each global micro-batch, without end; epochs follow each other.

        Args:
            start_sample: samples seen before; a multiple of ``global_micro_batch`` when a run is resumed.
            global_micro_batch: samples per micro-batch over all ranks.
            rank: takes the contiguous slice ``rank`` of each.
            world_size: ranks; must divide ``global_micro_batch``.
            workers: processes that read ahead; the batches and their order do not depend on it.

        Raises:
            DataError: there are more ranks than blocks, or the ranks cannot share the micro-batch.
        """
        if world_size > self._blocks:
            raise DataError(f"split {self.split!r} has {self._blocks} blocks, fewer than the job's {world_size} ranks; "
                            "use fewer ranks or a larger split")  # fmt: skip
        return rank_batches(self, start_sample, global_micro_batch, rank=rank, world_size=world_size, workers=workers)

    def sequential(
        self, batch_size: int, rank: int = 0, world_size: int = 1, *, max_blocks: int | None = None,
        documents: NDArray[np.int64] | None = None,
    ) -> Iterator[tuple[Batch, list[list[Segment]]]]:  # fmt: skip
        """Yield (batch, pieces of each row) once over the split in file order, for evaluation.

        Every rank makes the same number of batches, and all have ``batch_size`` rows: under ZeRO-3 each call of a layer
        is a collective. Rows that are missing at the end are filled by :func:`pad_rows` and have no pieces.

        Args:
            batch_size: blocks per batch.
            rank: takes every ``world_size``-th batch.
            world_size: ranks.
            max_blocks: read at most so many blocks, evenly spaced: file order is by length, so that the first ones hold
                the longest documents.
            documents: read only blocks that hold one of these documents; others in the same block come along.
        """
        places = self._places(max_blocks, documents)
        for call in range(self._calls(len(places), batch_size, world_size)):
            first = (call * world_size + rank) * batch_size
            mine = places[first : first + batch_size]
            batch, segments = self._read_places(mine or places[:1])
            if not mine:
                batch["labels"], segments = torch.full_like(batch["labels"], IGNORED_LABEL), [[]]
            yield pad_rows(batch, batch_size), segments + [[]] * (batch_size - len(segments))

    def sequential_batches(
        self, batch_size: int, world_size: int = 1, *, documents: NDArray[np.int64] | None = None
    ) -> int:
        """Return how many batches :meth:`sequential` yields on each rank."""
        return self._calls(len(self._places(None, documents)), batch_size, world_size)

    def document_table(self) -> pa.Table:
        """Return one row per document: doc, sha256 (of its text), n_tokens, n_characters, zlib_bytes.

        Raises:
            DataError: the table is missing or altered.
        """
        path = self._folder / DOCUMENTS
        if not path.is_file() or file_sha256(path) != self._documents_sha256:
            raise DataError(f"{path}: missing or altered; remove the folder and run `dualtok prepare` again")
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()

    @staticmethod
    def _calls(blocks: int, batch_size: int, world_size: int) -> int:
        return -(-blocks // (batch_size * world_size))

    def _places(self, max_blocks: int | None, documents: NDArray[np.int64] | None) -> list[tuple[str, int]]:
        if documents is not None:
            return [(file, row) for file in self._entries for row in self._shard(file).rows_of(documents).tolist()]
        files, ends = list(self._entries), np.cumsum([entry.rows for entry in self._entries.values()])
        wanted = self._blocks if max_blocks is None else min(max_blocks, self._blocks)
        blocks = np.arange(wanted) * self._blocks // wanted
        shards = np.searchsorted(ends, blocks, side="right")
        rows = blocks - np.concatenate([[0], ends])[shards]
        return [(files[shard], row) for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]

    def _read_places(self, places: Sequence[tuple[str, int]]) -> tuple[Batch, list[list[Segment]]]:
        shards = [self._shard(file) for file, _ in places]
        rows = [row for _, row in places]
        ids = np.stack([shard.input_ids[row] for shard, row in zip(shards, rows, strict=True)])
        batch = model_inputs(ids, [shard.lengths(row) for shard, row in zip(shards, rows, strict=True)])
        if self._scores is not None:
            losses = [self._scores.read(Path(file).stem, np.array([row]))[0] for file, row in places]
            scored = torch.from_numpy(np.stack(losses).astype(np.float32, copy=False))
            batch["reference_loss"] = torch.where(batch["labels"] == IGNORED_LABEL, 0.0, scored)
        return batch, [shard.segments(row) for shard, row in zip(shards, rows, strict=True)]

    def _shard(self, file: str) -> Shard:
        if file not in self._open:
            self._open[file] = Shard(self._folder / file)
        return self._open[file]

    def _draw_lane_order(self, epoch: int, lane: int) -> tuple[list[str], NDArray[np.int64]]:
        """Return a lane's shards in this epoch's order, and the positions in the lane at which each ends."""
        shards = self._lane_shards[lane]
        order = np.random.default_rng([self.seed, epoch, lane]).permutation(len(shards))
        return [shards[i].file for i in order], np.cumsum([shards[i].rows for i in order])

    def _draw_row_order(self, epoch: int, file: str) -> NDArray[np.int64]:
        entry = self._entries[file]
        number = self._lane_shards[entry.lane].index(entry)
        return np.random.default_rng([self.seed, epoch, entry.lane, number + 1]).permutation(entry.rows)

    def __getstate__(self) -> dict[str, object]:
        """Leave memory maps and caches behind: a data worker opens its own."""
        state = self.__dict__.copy()
        state.update(_open={}, _lane_order=None, _row_order=None)
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take over another process's stream."""
        self.__dict__.update(state)
        self._lane_order = lru_cache(maxsize=4 * self.lanes)(self._draw_lane_order)
        self._row_order = lru_cache(maxsize=4 * self.lanes)(self._draw_row_order)


class _Reader(Protocol):
    """What reads samples by their numbers."""

    def read(self, samples: Sequence[int]) -> Batch:
        """Return the batch of some samples, in their order."""


def rank_batches(
    stream: _Reader, start_sample: int, global_micro_batch: int, *, rank: int, world_size: int, workers: int
) -> Iterator[Batch]:
    """Yield one rank's share of each global micro-batch, without end; see :meth:`BlockStream.batches`."""
    if global_micro_batch % world_size:
        raise DataError(f"a micro-batch of {global_micro_batch} blocks cannot be shared by {world_size} ranks")
    dataset = _RankBatches(stream, start_sample, global_micro_batch, rank, global_micro_batch // world_size)
    if workers == 0:
        return iter(dataset)
    return iter(DataLoader(dataset, batch_size=None, num_workers=workers))


class _RankBatches(IterableDataset[Batch]):
    """The endless batches of one rank; data worker w of W makes every W-th."""

    def __init__(self, stream: _Reader, start: int, global_micro_batch: int, rank: int, share: int) -> None:
        self._stream, self._start, self._stride = stream, start, global_micro_batch
        self._rank, self._share = rank, share

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, every = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        while True:
            first = self._start + number * self._stride + self._rank * self._share
            yield self._stream.read(range(first, first + self._share))
            number += every
