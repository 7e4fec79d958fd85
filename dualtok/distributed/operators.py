"""DeepSpeed's compiled operators: one process of a host builds each at a time, and nobody waits for it without a word.

torch 2.13.0 compiles and loads an extension under a file ``lock`` in ``TORCH_EXTENSIONS_DIR``. Every later process
waits, silently, until that file is gone, and then takes the operator for built. A process that was killed while it
compiled leaves the file behind, and every job on the host hangs. Here each operator is built under a lock of the system
instead, which goes with the process that holds it, and files that nobody holds are removed.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Any

import psutil

from dualtok.errors import DualtokError
from dualtok.files import locked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Imported where they are used, for what they take to load: torch (1 s), DeepSpeed (2 s).

POLL_SECONDS = 0.2
NOTICE_AFTER_SECONDS = 3.0
"""Shorter waits are not worth a line."""
SHARED_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "beegfs", "ceph", "fuse", "9p", "wekafs")
"""Where the process that holds a lock may be on another host."""
SETTLE_SECONDS = 0.5
"""Between two looks at a lock that nobody holds: its holder closes it a moment before it removes it."""


def watch_operators() -> None:
    """Let every operator that this process loads from now on be built in turn, and told about.

    The environment's own ``ninja`` comes first in ``PATH``: each version takes what another has built for stale.
    """
    from deepspeed.ops.op_builder.builder import OpBuilder

    own = Path(sys.executable).with_name("ninja")
    if own.is_file():
        os.environ["PATH"] = os.pathsep.join([str(own.parent), os.environ.get("PATH", "")])
    if not hasattr(OpBuilder.jit_load, "__wrapped__"):
        OpBuilder.jit_load = _in_turn(OpBuilder.jit_load)


def _in_turn(jit_load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(jit_load)
    def load(builder: Any, *arguments: Any, **settings: Any) -> Any:
        folder, name = operators_folder(), str(builder.name)
        with _turn(folder, name):
            _wait_for_others(folder, name)
            with _notice(f"DeepSpeed compiles its operator {name} for this host, once; it takes a minute or more"):
                return jit_load(builder, *arguments, **settings)

    return load


@contextmanager
def _turn(folder: Path, name: str) -> Iterator[None]:
    """Wait until no other process of this host builds an operator, and keep others from it."""
    folder.mkdir(parents=True, exist_ok=True)

    def notify(holder: str) -> None:
        _print(f"waiting for {holder} to compile DeepSpeed's operator {name} in {folder}")

    # On a file system without locks, torch's own lock file is all there is.
    with locked(folder / f".{name}.turn", f"process {os.getpid()}", notify, NOTICE_AFTER_SECONDS):
        yield


def _wait_for_others(folder: Path, name: str) -> None:
    """Wait for a process that compiles the operator without dualtok, until its lock file is gone or nobody holds it."""
    began, said = time.monotonic(), False
    for lock in (*folder.glob(f"{name}/lock"), *folder.glob(f"*/{name}/lock")):
        while lock.exists():
            if not is_held(lock) and not is_shared(lock):
                time.sleep(POLL_SECONDS)  # its holder closes it a moment before it removes it
                if lock.exists() and not is_held(lock):
                    lock.unlink(missing_ok=True)
                    _print(f"removed {lock}, which a compilation that was killed had left")
                    break
            if not said and time.monotonic() - began > NOTICE_AFTER_SECONDS:
                other = "another host" if is_shared(lock) else "another process"
                _print(f"waiting for {other} to compile DeepSpeed's operator {name} ({lock})")
                said = True
            time.sleep(POLL_SECONDS)


@contextmanager
def _notice(line: str) -> Iterator[None]:
    """Say a line if what follows takes longer than a moment."""
    timer = Timer(NOTICE_AFTER_SECONDS, _print, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _print(line: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError, ValueError):  # a terminal that has gone must not stop the run
            print(f"dualtok: {line}", file=sys.stderr, flush=True)


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


def clear_stale_locks() -> None:
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
