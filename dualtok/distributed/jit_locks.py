"""Locks of DeepSpeed's compiled operators that nobody holds any more.

torch 2.13.0 compiles and loads an extension under a file ``lock`` in ``TORCH_EXTENSIONS_DIR``, and every later process
waits for it to go. A process that was killed meanwhile leaves the file behind, and every job on the host then hangs
without a word.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil

from dualtok.errors import DualtokError

# Imported where they are used, for what they take to load: torch (1 s).

SHARED_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "beegfs", "ceph", "fuse", "9p", "wekafs")
"""Where the process that holds a lock may be on another host."""
SETTLE_SECONDS = 0.5
"""Between two looks at a lock that nobody holds: its holder closes it a moment before it removes it."""


def stale_locks(folder: Path) -> list[Path]:
    """Return the lock files that no process of this host holds open."""
    found = [lock for pattern in ("*/lock", "*/*/lock") for lock in sorted(folder.glob(pattern))]
    abandoned = [lock for lock in found if not is_held(lock)]
    if abandoned:
        time.sleep(SETTLE_SECONDS)
    return [lock for lock in abandoned if not is_held(lock)]


def remove_stale_locks(folder: Path) -> list[Path]:
    """Remove the lock files that no process of this host holds open.

    Raises:
        DualtokError: such a file lies on a file system that hosts share, where it may be held by another one.
    """
    removed = []
    for lock in stale_locks(folder):
        if is_shared(lock):
            raise DualtokError(
                f"{lock}: a lock of a compilation that no process of this host holds; if none on another host does, "
                "remove it (or set TORCH_EXTENSIONS_DIR to a folder of this host): every start would wait for it"
            )
        lock.unlink(missing_ok=True)
        removed.append(lock)
    return removed


def operators_folder() -> Path:
    """Return where torch compiles extensions on this host."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def remove_dead_locks() -> None:
    """Remove stale locks before operators are loaded, and say so."""
    for lock in remove_stale_locks(operators_folder()):
        print(f"removed {lock}, a lock that a killed compilation had left", file=sys.stderr, flush=True)


def is_held(lock: Path) -> bool:
    """Return whether a process has the file open, as torch does while it compiles."""
    try:
        there = lock.stat()
    except FileNotFoundError:
        return True  # gone meanwhile: not stale
    for process in psutil.process_iter():
        try:
            descriptors = list(Path(f"/proc/{process.pid}/fd").iterdir())
        except OSError:  # ended, or another user's
            continue
        for descriptor in descriptors:
            try:
                found = descriptor.stat()
            except OSError:
                continue
            if (found.st_dev, found.st_ino) == (there.st_dev, there.st_ino):
                return True
    return False


def is_shared(path: Path) -> bool:
    """Return whether a path lies on a file system that several hosts may have mounted."""
    mounts = [
        (len(Path(part.mountpoint).parts), part)
        for part in psutil.disk_partitions(all=True)
        if path.resolve().is_relative_to(part.mountpoint)
    ]
    if not mounts:
        return False
    kind = max(mounts, key=lambda mount: mount[0])[1].fstype
    return kind.split(".")[0] in SHARED_FILE_SYSTEMS
