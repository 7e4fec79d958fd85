"""The shards of one split, opened when they are read, checked, and fetched ahead from an address."""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from dualtok.data.manifest import ShardEntry, check_shard
from dualtok.data.remote.remote import Location, RemoteFile, RemoteFolder
from dualtok.data.remote.storage import BadShardError
from dualtok.data.shards import Shard
from dualtok.data.stream.rank_batches import Fetches

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

LOG = logging.getLogger(__name__)


class Losses(Protocol):
    """Reference losses of a split's shards."""

    def read(self, shard_stem: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the losses [len(rows), t] of some rows of a shard."""

    def prefetch(self, shard_stem: str) -> None:
        """Fetch a shard's losses in the background, if they lie at an address."""


class ShardReader:
    """Gives the shards of a split, memory-mapped.

    Those of a local folder are checked at once, those at an address as each arrives.

    Args:
        location: the prepared folder, or its address.
        folder: name of the split's folder in it.
        shards: the split's.
        lanes: shards that a reader is in at a time.
        losses: reference losses that belong to them.
        verify: whether to compare a local folder's shards' SHA-256 with the manifest at once.
        verify_rank: this reader among those that share that work; each hashes every ``verify_world_size``-th shard.
        verify_world_size: readers that open the same split at once.
        masked: whether each shard must say which tokens are trained.
        on_bad_shard: ``skip`` gives no shard for one that is missing or altered; each reader then hashes every shard
            that it opens.

    Raises:
        DataError: a shard is missing, truncated or altered (and not to be skipped).
    """

    def __init__(
        self,
        location: Location,
        folder: str,
        shards: Sequence[ShardEntry],
        *,
        lanes: int,
        losses: Losses | None,
        verify: bool,
        verify_rank: int,
        verify_world_size: int,
        on_bad_shard: Literal["stop", "skip"],
        masked: bool,
    ) -> None:
        self._masked = masked
        self._location, self._folder, self._lanes = location, folder, lanes
        self._losses, self.skips = losses, on_bad_shard == "skip"
        self.entries = {shard.file: shard for shard in shards}
        self._bad: set[str] = set()
        self._sound: set[str] = set()
        """Local shards that this reader need not hash again; kept under ``skip`` alone."""
        self._open: OrderedDict[str, Shard] = OrderedDict()
        self._ahead: dict[str, int] = {}
        """Bytes of the shards that are fetched ahead and not yet opened."""
        self.fetches = Fetches()
        """What was found of shards at an address so far."""
        if isinstance(location, Path):
            for number, shard in enumerate(shards):
                self._check(location, shard, hashed=verify and number % verify_world_size == verify_rank)

    @property
    def is_remote(self) -> bool:
        """Whether the shards lie at an address."""
        return isinstance(self._location, RemoteFolder)

    def shard(self, file: str) -> Shard:
        """Return a shard.

        Raises:
            BadShardError: it is missing or altered.
            DataError: it cannot be read.
        """
        self._ahead.pop(file, None)
        if file not in self._open:
            # A reader is in one shard of each lane at a time; without a bound all that it ever read stays mapped.
            while len(self._open) > self._lanes:
                self._open.popitem(last=False)
            self._open[file] = self._map(self.entries[file])
        self._open.move_to_end(file)
        return self._open[file]

    def readable(self, file: str) -> Shard | None:
        """Return a shard whose reference losses, if there are any, can be read too; None if it is to be skipped."""
        if file in self._bad:
            return None
        try:
            shard = self.shard(file)
            if self._losses is not None:
                self._losses.read(Path(file).stem, np.zeros(0, dtype=np.int64))
        except BadShardError as problem:
            self._skip(file, problem)
            return None
        return shard

    def is_bad(self, file: str) -> bool:
        """Return whether a shard was skipped."""
        return file in self._bad

    def prefetch(self, files: Iterable[str]) -> bool:
        """Begin to fetch shards that are read soon, if they lie at an address.

        Returns:
            Whether all of them are under way, so that it is worth to look further ahead.
        """
        if not isinstance(self._location, RemoteFolder) or not self._location.settings.prefetch:
            return False
        for file in dict.fromkeys(files):
            if file in self._open or file in self._ahead or file in self._bad:
                continue
            size = self.entries[file].bytes
            few = len(self._ahead) < self._location.settings.prefetch
            if not few or sum(self._ahead.values()) + size > self._location.prefetch_bytes:
                return False
            self._ahead[file] = size
            self._location.prefetch(self._remote(self.entries[file]))
            if self._losses is not None:
                self._losses.prefetch(Path(file).stem)
        return True

    def forget_prefetched(self) -> None:
        """Begin a new search for shards to fetch; an earlier reader may have left some that it never opened."""
        self._ahead.clear()

    def _skip(self, file: str, problem: BadShardError) -> None:
        if not self.skips:
            raise problem
        self._bad.add(file)
        rows = self.entries[file].rows
        LOG.warning("dualtok: %s: the %d blocks of %s/%s are skipped", problem, rows, self._folder, file)

    def _check(self, folder: Path, shard: ShardEntry, *, hashed: bool) -> None:
        """Check a local shard before the first is read."""
        try:
            check_shard(folder / self._folder / shard.file, shard, hashed=hashed)
        except BadShardError as problem:
            self._skip(shard.file, problem)
        else:
            if hashed and self.skips:
                self._sound.add(shard.file)

    def _map(self, entry: ShardEntry) -> Shard:
        if isinstance(self._location, RemoteFolder):
            remote = self._remote(entry)
            self.fetches += Fetches(1, int(self._location.has(remote)))
            return self._location.open(remote, lambda path: self._opened(path, f"{self._location}/{remote.name}"))
        path = self._location / self._folder / entry.file
        if self.skips and entry.file not in self._sound:  # only one of the ranks has hashed it at the start
            check_shard(path, entry)
        return self._opened(path, str(path))

    def _opened(self, path: Path, origin: str) -> Shard:
        shard = Shard(path, origin)
        if shard.is_masked != self._masked:
            says = "does not say" if self._masked else "says"
            raise BadShardError(
                f"{origin}: {says} which tokens are trained, as the manifest's other shards do not; remove the folder "
                "and prepare again"
            )
        return shard

    def _remote(self, entry: ShardEntry) -> RemoteFile:
        return RemoteFile(f"{self._folder}/{entry.file}", entry.sha256, entry.bytes)

    def __getstate__(self) -> dict[str, object]:
        """Leave memory maps behind: a data worker opens its own."""
        return {**self.__dict__, "_open": OrderedDict(), "_ahead": {}}
