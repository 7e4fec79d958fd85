"""A split's blocks as a stream whose order depends on (seed, epoch) alone, not on ranks, workers or where it was
resumed (:mod:`.order`).

Rank r takes the contiguous slice r of each global micro-batch. The position in the stream is one integer, the samples
seen; seeking to it costs a few permutations, not a replay.

Legend: b batch, t position.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from dualtok.data.folds import fold_of
from dualtok.data.manifest import Manifest, split_entry
from dualtok.data.packing import PADDING_ID, Batch, Segment, model_inputs, pad_rows
from dualtok.data.stream.order import BlockOrder
from dualtok.data.stream.rank_batches import Fetches, RankBatches, rank_batches
from dualtok.data.stream.shard_reader import ShardReader
from dualtok.errors import DataError
from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from dualtok.config.folds import LeaveOut
    from dualtok.data.remote.remote import Location
    from dualtok.data.stream.shard_reader import Losses

SKIPPED = "skipped"
"""Column [b, 1] of a batch: 1 for a block of a bad shard, which is empty. Only there under ``on_bad_shard: skip``."""


class BlockStream:
    """Blocks of one split of a prepared folder; :meth:`.folder.DataFolder.open` makes one.

    Args:
        location: the prepared folder, or its address.
        manifest: its manifest.
        split: one of its splits.
        seed: seed of the order.
        losses: reference losses; batches then have ``reference_loss``.
        verify: as :class:`.shard_reader.ShardReader` takes it, like the next two.
        verify_rank: likewise.
        verify_world_size: likewise.
        on_bad_shard: ``skip`` gives the blocks of a shard that is missing or altered as empty ones, whose labels are
            all ignored, and marks them in a column ``skipped``.
        leave_out: a fold whose documents are not to be learned: their labels are ignored. They stay in their blocks.

    Raises:
        DataError: the split does not exist, or a shard is missing, truncated or altered (and not to be skipped).
    """

    def __init__(
        self,
        location: Location,
        manifest: Manifest,
        split: str,
        *,
        seed: int,
        losses: Losses | None = None,
        verify: bool = True,
        verify_rank: int = 0,
        verify_world_size: int = 1,
        on_bad_shard: Literal["stop", "skip"] = "stop",
        leave_out: LeaveOut | None = None,
    ) -> None:
        entry = split_entry(manifest, split, location)
        self.split, self.seed = split, seed
        self.block_length, self.lanes = manifest.block_length, manifest.lanes
        self._losses, self._leave_out, self._masked = losses, leave_out, manifest.is_masked
        self._order = BlockOrder(entry.shards, manifest.lanes, seed=seed)
        self._reader = ShardReader(
            location,
            manifest.folder_of(split),
            entry.shards,
            lanes=manifest.lanes,
            losses=losses,
            verify=verify,
            verify_rank=verify_rank,
            verify_world_size=verify_world_size,
            on_bad_shard=on_bad_shard,
            masked=manifest.is_masked,
        )

    def __len__(self) -> int:
        """Return the number of blocks, the samples of one epoch."""
        return self._order.blocks

    @property
    def is_remote(self) -> bool:
        """Whether its shards lie at an address."""
        return self._reader.is_remote

    def locate(self, sample: int) -> tuple[int, str, int]:
        """Return (epoch, shard file, row) of a sample, counted from 0 over all epochs."""
        return self._order.locate(sample)

    def read(self, samples: Sequence[int]) -> Batch:
        """Return the batch of some samples, in their order."""
        batch, skipped = self._read_positions([self.locate(sample)[1:] for sample in samples])
        if self._reader.skips:
            batch[SKIPPED] = torch.tensor(skipped, dtype=torch.int64)[:, None]
        return batch

    def prefetch(self, samples: Sequence[int]) -> bool:
        """Begin to fetch the shards of samples that are read soon; returns whether to look further ahead."""
        return self._reader.prefetch(self._order.file_of(sample) for sample in samples)

    def forget_prefetched(self) -> None:
        """Begin a new search for shards to fetch; an earlier reader may have left some that it never opened."""
        self._reader.forget_prefetched()

    def fetches(self) -> Fetches:
        """Return what this reader has found of shards at an address so far."""
        return self._reader.fetches

    def read_rows(self, shard_file: str, rows: NDArray[np.int64]) -> Batch:
        """Return the batch of some rows of one shard."""
        return self._read_positions([(shard_file, int(row)) for row in rows])[0]

    def shards(self) -> list[tuple[str, int]]:
        """Return (file, rows) of every shard, in the order of the manifest."""
        return [(file, entry.rows) for file, entry in self._reader.entries.items()]

    def pieces(self, shard_file: str, rows: NDArray[np.int64]) -> list[list[Segment]]:
        """Return the pieces of some rows of one shard."""
        return [self._reader.shard(shard_file).segments(int(row)) for row in rows]

    def batches(
        self, start_sample: int, global_micro_batch: int, rank: int = 0, world_size: int = 1, workers: int = 0
    ) -> RankBatches:
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
        if world_size > len(self):
            raise DataError(
                f"split {self.split!r} has {len(self)} blocks, fewer than the job's {world_size} ranks; "
                "use fewer ranks or a larger split"
            )
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
        positions = self._positions(max_blocks, documents)
        for call in range(self._calls(len(positions), batch_size, world_size)):
            first = (call * world_size + rank) * batch_size
            mine = positions[first : first + batch_size]
            batch, _ = self._read_positions(mine or positions[:1])
            segments = [
                [] if self._reader.is_bad(file) else self._reader.shard(file).segments(row) for file, row in mine
            ]
            if not mine:
                batch["labels"] = torch.full_like(batch["labels"], IGNORED_LABEL)
            yield pad_rows(batch, batch_size), segments + [[]] * (batch_size - len(segments))

    def sequential_batches(
        self, batch_size: int, world_size: int = 1, *, documents: NDArray[np.int64] | None = None
    ) -> int:
        """Return how many batches :meth:`sequential` yields on each rank."""
        return self._calls(len(self._positions(None, documents)), batch_size, world_size)

    @staticmethod
    def _calls(blocks: int, batch_size: int, world_size: int) -> int:
        return -(-blocks // (batch_size * world_size))

    def _positions(self, max_blocks: int | None, documents: NDArray[np.int64] | None) -> list[tuple[str, int]]:
        if documents is not None:
            return [
                (file, row)
                for file in self._reader.entries
                for row in self._reader.shard(file).rows_of(documents).tolist()
            ]
        entries = self._reader.entries
        files, ends = list(entries), np.cumsum([entry.rows for entry in entries.values()])
        wanted = len(self) if max_blocks is None else min(max_blocks, len(self))
        blocks = np.arange(wanted) * len(self) // wanted
        shards = np.searchsorted(ends, blocks, side="right")
        rows = blocks - np.concatenate([[0], ends])[shards]
        return [(files[shard], row) for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]

    def _read_positions(self, positions: Sequence[tuple[str, int]]) -> tuple[Batch, list[bool]]:
        """Return the batch, and whether each row had to be left empty."""
        shards = {file: self._reader.readable(file) for file in dict.fromkeys(file for file, _ in positions)}
        ids = np.full((len(positions), self.block_length), PADDING_ID, dtype=np.int32)
        lengths: list[NDArray[np.int32]] = [np.array([self.block_length], dtype=np.int32)] * len(positions)
        trained = np.ones(ids.shape, dtype=np.bool_) if self._masked else None
        losses = np.zeros(ids.shape, dtype=np.float32)
        for number, (file, row) in enumerate(positions):
            shard = shards[file]
            if shard is not None:
                ids[number], lengths[number] = shard.input_ids[row], shard.lengths(row)
                if trained is not None:
                    trained[number] = shard.trained(row)
                if self._losses is not None:
                    losses[number] = self._losses.read(Path(file).stem, np.array([row]))[0]
        batch = model_inputs(ids, lengths, trained)
        skipped = [shards[file] is None for file, _ in positions]
        batch["labels"][torch.tensor(skipped)] = IGNORED_LABEL
        if self._leave_out is not None:
            pieces = [[] if (shard := shards[file]) is None else shard.segments(row) for file, row in positions]
            self._ignore_fold(batch["labels"], pieces, self._leave_out)
        if self._losses is not None:
            batch["reference_loss"] = torch.where(batch["labels"] == IGNORED_LABEL, 0.0, torch.from_numpy(losses))
        return batch, skipped

    @staticmethod
    def _ignore_fold(labels_bt: torch.Tensor, pieces: list[list[Segment]], leave_out: LeaveOut) -> None:
        """Ignore the labels of the fold's documents."""
        for labels_t, row in zip(labels_bt, pieces, strict=True):
            left = fold_of([piece.doc for piece in row], leave_out.folds) == leave_out.fold
            ends = np.cumsum([piece.length for piece in row])
            for out, end, piece in zip(left, ends, row, strict=True):
                if out:
                    labels_t[end - piece.length : end] = IGNORED_LABEL
