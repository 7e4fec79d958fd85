"""A folder of verified files on a host's own disk, bounded in bytes, shared by all ranks and jobs of the host.

A file's name is its SHA-256, so that it is never out of date, whoever put it there. Its place is taken by a rename, so
that it is whole or absent; until then it is a ``.part`` file, which its writer holds locked. Locks are the kernel's
(``flock``) and die with their process: nothing that a killed job leaves behind is ever waited for or believed. They are
on the data files themselves, shared by readers, and stay through the rename; filelock locks files of its own.

A reader locks a file only while it opens it. Afterwards it may be removed: a memory map keeps the content.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from dualtok.errors import DataError
from dualtok.files import file_sha256, sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LOG = logging.getLogger(__name__)
PART = ".part"
POLL_SECONDS = 0.02


class ShardCache:
    """The cache's folder, as one process sees it. Several threads may use it; it can be pickled and forked.

    Args:
        folder: where the files lie.
        limit: most bytes that stay there. It is exceeded, and said so, only while the files in use need more.
        patience: seconds to wait for another process that fetches the same file and makes no progress.
    """

    def __init__(self, folder: Path, limit: int, patience: float) -> None:
        self.folder, self.limit = folder, limit
        self._patience = patience
        self._verified: set[str] = set()
        """What this process has compared with its name."""
        self._complained = False

    def has(self, sha256: str) -> bool:
        """Return whether a file is there, whole; it may be gone the next moment."""
        return (self.folder / sha256).exists()

    @contextmanager
    def hold(self, sha256: str, size: int, fetch: Callable[[Path], None]) -> Iterator[Path]:
        """Give the path of a file, fetched first if it is not there; it stays as long as the block lasts.

        Args:
            sha256: its name.
            size: its bytes, to make room; 0 if unknown.
            fetch: writes the file to a path and verifies it, or raises.

        Raises:
            DataError: the folder cannot be used, or another process takes too long; and what ``fetch`` raises.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = None
            while descriptor is None:
                descriptor = self._lock_whole(sha256) or self._add(sha256, size, fetch)
        except OSError as error:
            raise DataError(
                f"{self.folder}: {error.strerror or error}; check the folder of data.stream.cache_dir"
            ) from None
        try:
            yield self.folder / sha256
        finally:
            _unlock(descriptor)

    def _lock_whole(self, sha256: str) -> int | None:
        """Return the descriptor of a file under a shared lock, or None if there is no such file or it was altered."""
        path = self.folder / sha256
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not _is_at(descriptor, path):  # removed while it was opened
            _unlock(descriptor)
            return None
        if sha256 not in self._verified and file_sha256(path) != sha256:
            LOG.warning("dualtok: %s: the cached file was altered; it is fetched again", path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # others may be about to find the same
            if _is_at(descriptor, path):
                path.unlink()
            _unlock(descriptor)
            return None
        self._verified.add(sha256)
        with suppress(OSError):  # a cache of another user: its files are used, their times are not ours to set
            os.utime(path)
        return descriptor

    def _add(self, sha256: str, size: int, fetch: Callable[[Path], None]) -> int | None:
        """Fetch a file; returns its descriptor under a shared lock, or None if another process was there first."""
        path, part = self.folder / sha256, self.folder / f"{sha256}.{size}{PART}"
        descriptor = self._lock_part(part)
        try:
            if path.exists():
                part.unlink()
            else:
                self._make_room()
                fetch(part)
                os.fsync(descriptor)
                part.replace(path)
                sync_folder(self.folder)
                self._verified.add(sha256)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if _is_at(descriptor, path):
                    return descriptor
        except BaseException:
            part.unlink(missing_ok=True)
            _unlock(descriptor)
            raise
        _unlock(descriptor)
        return None

    def _lock_part(self, part: Path) -> int:
        """Return the descriptor of a part under this process's lock; waits for another one's."""
        seen, since = None, time.monotonic()
        while True:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
            if _try_lock(descriptor) and _is_at(descriptor, part):
                return descriptor
            state = os.fstat(descriptor)
            _unlock(descriptor)
            if seen != (seen := (state.st_ino, state.st_size)):
                since = time.monotonic()
            if time.monotonic() - since > self._patience:
                raise DataError(
                    f"{part}: another process holds it without any progress for {self._patience:.0f} s; see which "
                    "(`lslocks`), or choose another data.stream.cache_dir"
                )
            time.sleep(POLL_SECONDS)

    def _make_room(self) -> None:
        """Remove what was used longest ago until all, parts in the making included, is within the limit."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            whole: list[tuple[float, int, Path]] = []
            total = 0
            for path in self.folder.iterdir():
                if path.suffix == PART:
                    # One that nobody holds was left by a process that died.
                    expected = path.name.split(".")[1]
                    total += int(expected) if not _remove_if_free(path) and expected.isdigit() else 0
                elif path.name != "lock":
                    with suppress(FileNotFoundError):
                        status = path.stat()
                        whole.append((status.st_mtime, status.st_size, path))
                        total += status.st_size
            for _, size, path in sorted(whole):
                if total <= self.limit:
                    return
                total -= size if _remove_if_free(path) else 0
        finally:
            _unlock(descriptor)
        if total > self.limit and not self._complained:
            self._complained = True
            LOG.warning(
                "dualtok: %s: what is in use takes %.3g GiB, more than data.stream.cache_gib=%.3g; only that is kept",
                self.folder,
                total / 2**30,
                self.limit / 2**30,
            )


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_if_free(path: Path) -> bool:
    """Remove a file that no process holds locked; returns whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        if not _try_lock(descriptor):
            return False
        if _is_at(descriptor, path):  # nobody else moves it while it is locked
            path.unlink()
        return True
    finally:
        _unlock(descriptor)


def _unlock(descriptor: int) -> None:
    # Closing alone would leave the lock to a process that was forked meanwhile.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether a path still names the open file."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_ino, here.st_dev) == (there.st_ino, there.st_dev)
