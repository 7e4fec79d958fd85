"""Files and folders that are whole or absent (temporary name, fsync, rename); locks that end with their process."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

from filelock import FileLock, Timeout
from pydantic import Field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A plain name in a manifest, so that none can point out of its folder."""


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that appears under ``path`` only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder that appears under ``path`` only when the block ends without an error; what was there goes then.

    One process at a time: what an interrupted one left is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


@contextmanager
def locked(path: Path, holder: str, when_taken: Callable[[str], None], patience: float = 0.0) -> Iterator[None]:
    """Hold a lock file as long as the block lasts; what it holds is the name of the process that has it.

    The system releases the lock with its process, however that ends. Where a file system has no locks, the block runs
    without one: a lock by a file's presence would outlive a process that is killed.

    Args:
        path: the file, in a folder that exists; it stays.
        holder: the name of this process.
        when_taken: called with the holder's name if another process keeps the lock for longer than ``patience``. It
            raises, or this process waits on.
        patience: seconds.
    """
    lock = FileLock(path, poll_interval=0.2, fallback_to_soft=False)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        when_taken(lock_holder(path))
        lock.acquire()
    except PermissionError:
        raise
    except OSError:
        pass  # a file system without locks
    try:
        path.write_text(f"{holder}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def lock_holder(path: Path) -> str:
    """Return what the holder of a lock file has written into it."""
    return path.read_text(encoding="utf-8").strip() or "another process"


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as stream:
        stream.write(text.encode("utf-8"))


def grant_as_umask_does(path: Path) -> None:
    """Give a file the mode of any other new file: safetensors makes its own for their owner alone, and a copy has that
    of its original."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with probe.open("wb") as stream:  # asking for the umask would change it for a moment, in all threads
        mode = os.fstat(stream.fileno()).st_mode & 0o777
    probe.unlink()
    path.chmod(mode)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 hex digest of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
