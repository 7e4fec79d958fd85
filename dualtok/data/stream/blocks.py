"""A split's blocks as a stream whose order depends on (seed, epoch) alone, not on ranks, workers or where it was
resumed.

Sample i of an epoch comes from lane i mod L. A lane visits its shards in a random order, and the rows of each shard in
a random order, so that a reader stays within one file for a while. Rank r takes the contiguous slice r of each global
micro-batch. The position in the stream is one integer, the samples seen; seeking to it costs a few permutations, not a
replay.

Legend: b batch, t position.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch

from dualtok.data.folds import fold_of
from dualtok.data.manifest import ShardEntry, check_shard, load_manifest, split_entry
from dualtok.data.packing import PADDING_ID, Segment, model_inputs
from dualtok.data.remote.remote import Place, RemoteFile, RemoteFolder, place_of
from dualtok.data.remote.storage import BadShardError
from dualtok.data.shards import Shard
from dualtok.data.stream.rank_batches import Batch, Fetches, RankBatches, rank_batches
from dualtok.errors import DataError
from dualtok.files import file_sha256
from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from dualtok.config.folds import LeaveOut

LOG = logging.getLogger(__name__)
DOCUMENTS = "documents.arrow"
SKIPPED = "skipped"
"""Column [b, 1] of a batch: 1 for a block of a bad shard, which is empty. Only there under ``on_bad_shard: skip``."""


class Scores(Protocol):
    """Reference losses of a split's shards."""

    def read(self, shard_stem: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the losses [len(rows), t] of some rows of a shard."""

    def prefetch(self, shard_stem: str) -> None:
        """Fetch a shard's losses in the background, if they lie at an address."""


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

    The shards of a local folder are checked when the stream is opened, those at an address as each arrives.

    Args:
        data_dir: a prepared folder, or its address.
        split: one of its splits.
        seed: seed of the order.
        scores: reference losses; batches then have ``reference_loss``.
        verify: whether to compare a local folder's shards' SHA-256 with the manifest on opening.
        verify_rank: this reader among those that share that work; each hashes every ``verify_world_size``-th shard.
        verify_world_size: readers that open the same split at once.
        on_bad_shard: ``skip`` gives the blocks of a shard that is missing or altered as empty ones, whose labels are
            all ignored, and marks them in a column ``skipped``; each reader then hashes every shard that it opens.
        leave_out: a fold whose documents are not to be learned: their labels are ignored. They stay in their blocks.

    Raises:
        DataError: the split does not exist, or a shard is missing, truncated or altered (and not to be skipped).
    """

    def __init__(
        self,
        data_dir: str | Place,
        split: str,
        *,
        seed: int,
        scores: Scores | None = None,
        verify: bool = True,
        verify_rank: int = 0,
        verify_world_size: int = 1,
        on_bad_shard: Literal["stop", "skip"] = "stop",
        leave_out: LeaveOut | None = None,
    ) -> None:
        self._place = place_of(data_dir)
        manifest = load_manifest(self._place)
        entry = split_entry(manifest, split, self._place)
        self.split, self.seed = split, seed
        self.block_length, self.lanes = manifest.block_length, manifest.lanes
        self._blocks = entry.blocks
        self._documents_sha256 = entry.documents_sha256
        self._scores, self._skips = scores, on_bad_shard == "skip"
        self._leave_out = leave_out
        self._entries = {shard.file: shard for shard in entry.shards}
        self._lane_shards: list[list[ShardEntry]] = [[] for _ in range(self.lanes)]
        self._numbers: dict[str, int] = {}
        """Which shard of its lane a file is."""
        self._bad: set[str] = set()
        self._sound: set[str] = set()
        """Local shards that this reader need not hash again; kept under ``skip`` alone."""
        for number, shard in enumerate(entry.shards):
            self._numbers[shard.file] = len(self._lane_shards[shard.lane])
            self._lane_shards[shard.lane].append(shard)
            if isinstance(self._place, Path):
                self._check(self._place, shard, hashed=verify and number % verify_world_size == verify_rank)
        self._open: OrderedDict[str, Shard] = OrderedDict()
        self._ahead: dict[str, int] = {}
        """Bytes of the shards that are fetched ahead and not yet opened."""
        self._fetches = Fetches()
        self._lane_order = lru_cache(maxsize=4 * self.lanes)(self._draw_lane_order)
        self._row_order = lru_cache(maxsize=4 * self.lanes)(self._draw_row_order)

    def __len__(self) -> int:
        """Return the number of blocks, the samples of one epoch."""
        return self._blocks

    @property
    def is_remote(self) -> bool:
        """Whether its shards lie at an address."""
        return isinstance(self._place, RemoteFolder)

    def locate(self, sample: int) -> tuple[int, str, int]:
        """Return (epoch, shard file, row) of a sample, counted from 0 over all epochs."""
        epoch, file, place = self._shard_of(sample)
        return epoch, file, int(self._row_order(epoch, file)[place])

    def _shard_of(self, sample: int) -> tuple[int, str, int]:
        """Return (epoch, shard file, which of its rows in the epoch's order)."""
        epoch, index = divmod(sample, self._blocks)
        lane, position = index % self.lanes, index // self.lanes
        files, ends = self._lane_order(epoch, lane)
        which = int(np.searchsorted(ends, position, side="right"))
        first = int(ends[which - 1]) if which else 0
        return epoch, files[which], position - first

    def read(self, samples: Sequence[int]) -> Batch:
        """Return the batch of some samples, in their order."""
        places = [self.locate(sample)[1:] for sample in samples]
        batch, skipped = self._read_places(places)
        if self._skips:
            batch[SKIPPED] = torch.tensor(skipped, dtype=torch.int64)[:, None]
        return batch

    def prefetch(self, samples: Sequence[int]) -> bool:
        """Begin to fetch the shards of samples that are read soon, if they lie at an address.

        Returns:
            Whether all of them are under way, so that it is worth to look further ahead.
        """
        if not isinstance(self._place, RemoteFolder) or not self._place.settings.prefetch:
            return False
        for file in dict.fromkeys(self._shard_of(sample)[1] for sample in samples):
            if file in self._open or file in self._ahead or file in self._bad:
                continue
            size = self._entries[file].bytes
            few = len(self._ahead) < self._place.settings.prefetch
            if not few or sum(self._ahead.values()) + size > self._place.prefetch_bytes:
                return False
            self._ahead[file] = size
            self._place.prefetch(self._remote(self._entries[file]))
            if self._scores is not None:
                self._scores.prefetch(Path(file).stem)
        return True

    def forget_prefetched(self) -> None:
        """Begin a new search for shards to fetch; an earlier reader may have left some that it never opened."""
        self._ahead.clear()

    def fetches(self) -> Fetches:
        """Return what this reader has found of shards at an address so far."""
        return self._fetches

    def read_rows(self, shard_file: str, rows: NDArray[np.int64]) -> Batch:
        """Return the batch of some rows of one shard."""
        return self._read_places([(shard_file, int(row)) for row in rows])[0]

    def shards(self) -> list[tuple[str, int]]:
        """Return (file, rows) of every shard, in the order of the manifest."""
        return [(file, entry.rows) for file, entry in self._entries.items()]

    def pieces(self, shard_file: str, rows: NDArray[np.int64]) -> list[list[Segment]]:
        """Return the pieces of some rows of one shard."""
        return [self._shard(shard_file).segments(int(row)) for row in rows]

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
        if world_size > self._blocks:
            raise DataError(
                f"split {self.split!r} has {self._blocks} blocks, fewer than the job's {world_size} ranks; "
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
        places = self._places(max_blocks, documents)
        for call in range(self._calls(len(places), batch_size, world_size)):
            first = (call * world_size + rank) * batch_size
            mine = places[first : first + batch_size]
            batch, _ = self._read_places(mine or places[:1])
            segments = [[] if file in self._bad else self._shard(file).segments(row) for file, row in mine]
            if not mine:
                batch["labels"] = torch.full_like(batch["labels"], IGNORED_LABEL)
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
        if isinstance(self._place, RemoteFolder):
            table = RemoteFile(f"{self.split}/{DOCUMENTS}", self._documents_sha256)
            return self._place.open(table, _read_table)
        path = self._place / self.split / DOCUMENTS
        if not path.is_file() or file_sha256(path) != self._documents_sha256:
            raise DataError(f"{path}: missing or altered; remove the folder and run `dualtok prepare` again")
        return _read_table(path)

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

    def _read_places(self, places: Sequence[tuple[str, int]]) -> tuple[Batch, list[bool]]:
        """Return the batch, and whether each row had to be left empty."""
        shards = {file: self._readable(file) for file in dict.fromkeys(file for file, _ in places)}
        ids = np.full((len(places), self.block_length), PADDING_ID, dtype=np.int32)
        lengths: list[NDArray[np.int32]] = [np.array([self.block_length], dtype=np.int32)] * len(places)
        losses = np.zeros(ids.shape, dtype=np.float32)
        for number, (file, row) in enumerate(places):
            shard = shards[file]
            if shard is not None:
                ids[number], lengths[number] = shard.input_ids[row], shard.lengths(row)
                if self._scores is not None:
                    losses[number] = self._scores.read(Path(file).stem, np.array([row]))[0]
        batch = model_inputs(ids, lengths)
        skipped = [shards[file] is None for file, _ in places]
        batch["labels"][torch.tensor(skipped)] = IGNORED_LABEL
        if self._leave_out is not None:
            pieces = [[] if (shard := shards[file]) is None else shard.segments(row) for file, row in places]
            self._ignore_fold(batch["labels"], pieces, self._leave_out)
        if self._scores is not None:
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

    def _readable(self, file: str) -> Shard | None:
        """Return a shard whose reference losses, if the stream has any, can be read too; None if it is skipped."""
        if file in self._bad:
            return None
        try:
            shard = self._shard(file)
            if self._scores is not None:
                self._scores.read(Path(file).stem, np.zeros(0, dtype=np.int64))
        except BadShardError as problem:
            self._skip(file, problem)
            return None
        return shard

    def _skip(self, file: str, problem: BadShardError) -> None:
        if not self._skips:
            raise problem
        self._bad.add(file)
        rows = self._entries[file].rows
        LOG.warning("dualtok: %s: the %d blocks of %s/%s are skipped", problem, rows, self.split, file)

    def _check(self, folder: Path, shard: ShardEntry, *, hashed: bool) -> None:
        """Check a local shard before the first is read."""
        try:
            check_shard(folder / self.split / shard.file, shard, hashed=hashed)
        except BadShardError as problem:
            self._skip(shard.file, problem)
        else:
            if hashed and self._skips:
                self._sound.add(shard.file)

    def _shard(self, file: str) -> Shard:
        self._ahead.pop(file, None)
        if file not in self._open:
            # A reader is in one shard of each lane at a time; without a bound all that it ever read stays mapped.
            while len(self._open) > self.lanes:
                self._open.popitem(last=False)
            self._open[file] = self._map(self._entries[file])
        self._open.move_to_end(file)
        return self._open[file]

    def _map(self, entry: ShardEntry) -> Shard:
        if isinstance(self._place, RemoteFolder):
            remote = self._remote(entry)
            self._fetches += Fetches(1, int(self._place.has(remote)))
            return self._place.open(remote, lambda path: Shard(path, f"{self._place}/{remote.name}"))
        path = self._place / self.split / entry.file
        if self._skips and entry.file not in self._sound:  # only one of the ranks has hashed it at the start
            check_shard(path, entry)
        return Shard(path)

    def _remote(self, entry: ShardEntry) -> RemoteFile:
        return RemoteFile(f"{self.split}/{entry.file}", entry.sha256, entry.bytes)

    def _draw_lane_order(self, epoch: int, lane: int) -> tuple[list[str], NDArray[np.int64]]:
        """Return a lane's shards in this epoch's order, and the positions in the lane at which each ends."""
        shards = self._lane_shards[lane]
        order = np.random.default_rng([self.seed, epoch, lane]).permutation(len(shards))
        return [shards[i].file for i in order], np.cumsum([shards[i].rows for i in order])

    def _draw_row_order(self, epoch: int, file: str) -> NDArray[np.int64]:
        entry = self._entries[file]
        number = self._numbers[file]
        return np.random.default_rng([self.seed, epoch, entry.lane, number + 1]).permutation(entry.rows)

    def __getstate__(self) -> dict[str, object]:
        """Leave memory maps and caches behind: a data worker opens its own."""
        state = self.__dict__.copy()
        state.update(_open=OrderedDict(), _ahead={}, _lane_order=None, _row_order=None)
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take over another process's stream."""
        self.__dict__.update(state)
        self._lane_order = lru_cache(maxsize=4 * self.lanes)(self._draw_lane_order)
        self._row_order = lru_cache(maxsize=4 * self.lanes)(self._draw_row_order)


def _read_table(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()
