"""Prepared data at an address: its small files read when asked for, its shards through the host's cache, the next ones
fetched in the background."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from dualtok.config.data import StreamConfig, is_address
from dualtok.data.remote.cache import ShardCache
from dualtok.data.remote.storage import Storage

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager


Result = TypeVar("Result")
MOST_THREADS = 8
"""Files that one process fetches at once in the background."""


class RemoteFile(NamedTuple):
    """A file of the prepared data and what it must be."""

    name: str
    """Path below the address."""
    sha256: str
    size: int | None = None
    """Bytes, where the manifest tells them."""


class RemoteFolder:
    """A prepared folder at an address. It can be sent to another process, and forked; each has threads of its own."""

    def __init__(self, address: str, settings: StreamConfig) -> None:
        self.settings = settings
        self.storage = Storage(address, settings)
        root = Path(settings.cache_dir) if settings.cache_dir is not None else default_cache()
        self.cache_root = root.expanduser()
        self._cache = self._new_cache()
        self._fetchers: tuple[int, _Fetchers] | None = None

    def __str__(self) -> str:
        """Return the address."""
        return self.storage.address

    def open(self, file: RemoteFile, opener: Callable[[Path], Result]) -> Result:
        """Return ``opener(path)`` of a local copy, which may be gone afterwards.

        Raises:
            BadShardError: the file is missing or altered, and stays so.
            DataError: it cannot be read, or not be kept on this host.
        """
        if self._fetchers is not None and self._fetchers[0] == os.getpid():
            self._fetchers[1].wait(file)
        with self._hold(file) as path:
            return opener(path)

    def has(self, file: RemoteFile) -> bool:
        """Return whether a file lies on this host, whole, so that nothing need be waited for."""
        return self._cache.has(file.sha256)

    def prefetch(self, file: RemoteFile) -> None:
        """Fetch a file in the background. A failure is left to :meth:`open`, which tries again."""
        if self._fetchers is None or self._fetchers[0] != os.getpid():
            with suppress(Exception):  # it is tried again, and told, by whoever needs it
                self.storage.connect()  # once, before several threads would
            threads = min(self.settings.prefetch, MOST_THREADS)
            self._fetchers = os.getpid(), _Fetchers(self._keep, threads)
        self._fetchers[1].submit(file)

    @property
    def prefetch_bytes(self) -> int:
        """Most bytes to fetch ahead: a small cache must not lose one shard to the next before either is read."""
        return self._cache.limit // 4

    def _keep(self, file: RemoteFile) -> None:
        with self._hold(file):
            pass

    def _hold(self, file: RemoteFile) -> AbstractContextManager[Path]:
        def fetch(part: Path) -> None:
            self.storage.fetch(file.name, part, sha256=file.sha256, size=file.size)

        return self._cache.hold(file.sha256, file.size or 0, fetch)

    def _new_cache(self) -> ShardCache:
        settings = self.settings
        # Whoever fetches the same shard may pause between attempts, and then wait for a byte.
        patience = 60.0 + settings.retry_seconds + settings.timeout_seconds
        return ShardCache(self.cache_root / "objects", int(settings.cache_gib * 2**30), patience)

    def __getstate__(self) -> dict[str, object]:
        """Leave threads and what this process has seen behind."""
        return {**self.__dict__, "_cache": None, "_fetchers": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take over another process's folder."""
        self.__dict__.update(state)
        self._cache = self._new_cache()


class _Fetchers:
    """Threads that fetch files; daemons, so that a process need not wait for a remote in order to end."""

    def __init__(self, keep: Callable[[RemoteFile], None], threads: int) -> None:
        self._keep = keep
        self._queue: SimpleQueue[tuple[RemoteFile, Future[None]]] = SimpleQueue()
        self._submitted: dict[str, Future[None]] = {}
        for number in range(threads):
            threading.Thread(target=self._work, name=f"dualtok-fetch-{number}", daemon=True).start()

    def submit(self, file: RemoteFile) -> None:
        """Put a file into the queue unless it is there."""
        if file.sha256 not in self._submitted:
            future = self._submitted[file.sha256] = Future()
            self._queue.put((file, future))

    def wait(self, file: RemoteFile) -> None:
        """Wait for a file that is just being fetched, and raise its error; leave one that is still in the queue."""
        future = self._submitted.pop(file.sha256, None)
        if future is not None and not future.cancel() and not future.done():
            future.result()

    def _work(self) -> None:
        while True:
            file, future = self._queue.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                self._keep(file)
            except BaseException as error:  # raised where the file is needed
                future.set_exception(error)
            else:
                future.set_result(None)


Location = Path | RemoteFolder
"""Where prepared data lies."""


def location_of(folder: str | Location, settings: StreamConfig | None = None) -> Location:
    """Return the local path, or the folder at an address, that a setting names.

    Args:
        folder: a path, or an address like ``s3://bucket/prepared``.
        settings: the run's ``data.stream``.
    """
    if isinstance(folder, Path | RemoteFolder):
        return folder
    if folder.startswith("file://"):
        return Path(folder.removeprefix("file://"))
    if not is_address(folder):
        return Path(folder)
    return _remote_folder(folder, json.dumps(asdict(settings or StreamConfig()), sort_keys=True))


@lru_cache(maxsize=64)
def _remote_folder(address: str, settings: str) -> RemoteFolder:
    """Return one object per address, so that all streams of a process share its connection and threads."""
    return RemoteFolder(address, StreamConfig(**json.loads(settings)))


def default_cache() -> Path:
    """Return the cache's folder where none is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualtok"
