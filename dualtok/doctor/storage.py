"""The folder where runs write: room, speed, and whether it can be written at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dualtok.doctor.result import CheckResult

if TYPE_CHECKING:
    from collections.abc import Iterator

GIB, MIB = 2**30, 2**20
QUICK_BYTES, WHOLE_BYTES = 16 * MIB, 256 * MIB
FREE_BYTES = 10 * GIB
SLOW = 50 * MIB
"""Bytes per second below which checkpoints take minutes: one of a model of 1 billion parameters has 12 GB."""


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Make a folder of the doctor's own in ``folder``; afterwards nothing is left that was not there before."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=".doctor-", dir=folder))
    own.chmod(0o755)  # other hosts may see it as another user
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
        for parent in missing:
            try:
                parent.rmdir()
            except OSError:  # a run has begun there meanwhile
                break


def check_disk(folder: Path, *, quick: bool = False) -> CheckResult:
    """Write a file to ``folder`` and read it back from the device."""
    name, size = "disk", QUICK_BYTES if quick else WHOLE_BYTES
    try:
        with scratch(folder) as own:
            free = shutil.disk_usage(own).free
            write, read = _speeds(own / "speed", size)
    except OSError as error:
        remedy = "free space (old checkpoints, caches), fix the folder, or choose another output_dir"
        return CheckResult(name, "fail", f"{folder}: {size // MIB} MiB cannot be written: {error.strerror}", remedy)
    found = f"{folder}: {free / GIB:.0f} GiB free, writes {write / MIB:,.0f} MiB/s, reads {read / MIB:,.0f} MiB/s"
    if free < FREE_BYTES:
        return CheckResult(
            name,
            "warn",
            found,
            "free space: a checkpoint has 12 bytes per parameter, and while one is written the one before stays",
        )
    if write < SLOW:
        return CheckResult(
            name,
            "warn",
            found,
            "choose an output_dir on a faster disk, fewer checkpoints "
            "(train.checkpoint_every), or train.checkpoint_in_background=true",
        )
    return CheckResult(name, "ok", found)


def _speeds(file: Path, size: int) -> tuple[float, float]:
    """Return bytes per second written (with fsync) and read (not from the page cache, where the system allows)."""
    block = os.urandom(4 * MIB)
    started = time.perf_counter()
    with file.open("wb", buffering=0) as stream:
        for _ in range(size // len(block)):
            if stream.write(block) != len(block):
                raise OSError(28, "No space left on device")
        os.fsync(stream.fileno())
    written = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while stream.read(len(block)):
            pass
    return size / (written - started), size / (time.perf_counter() - written)
