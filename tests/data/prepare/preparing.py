"""What the tests of preparation share: preparations in processes of their own, and what lies in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from dualtok.config.data import DataConfig
from tests.data.support import data_config
from tests.support import ROOT, environment, python
from tests.warm import fork_of

if TYPE_CHECKING:
    from pathlib import Path

PASSAGES, CHUNK = 360, 50
CHILD = """
import json, os, re, sys, time
from pathlib import Path
import dualtok.data.prepare.staged as staged
import dualtok.data.prepare.groups as groups
from dualtok.config.data import DataConfig
from dualtok.data.prepare.parts import parse_part
from dualtok.data.prepare.pipeline import finish, prepare, prepare_part

section, staged.CHUNK_DOCUMENTS, delay = json.loads(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
groups.RUN_DOCUMENTS, groups.RANGE_RECORDS = 2 * staged.CHUNK_DOCUMENTS, 20 * staged.CHUNK_DOCUMENTS
verb = sys.argv[4]
sync = os.fsync
def slow_disk(descriptor):
    os.write(1, b".")
    time.sleep(delay)
    sync(descriptor)
os.fsync = slow_disk
config = DataConfig(**section)
if verb == "prepare":
    prepare(config, progress=False)
elif verb == "finish":
    finish(config, progress=False)
else:
    prepare_part(config, parse_part(verb), progress=False)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def child(
    section: dict[str, Any], verb: str = "prepare", *, chunk: int = CHUNK, delay: float = 0, afresh: bool = False
) -> subprocess.Popen[str]:
    """Start ``prepare``, a part ``i/n`` or ``finish`` in a process of its own: small chunks, perhaps a slow disk.

    It prints a dot before each of its writes reaches the disk. ``afresh``: not as a fork (:mod:`tests.warm`), whose
    memory is its server's as well.
    """
    start = [sys.executable] if afresh else python()
    return subprocess.Popen(
        [*start, "-c", CHILD, json.dumps(section), str(chunk), str(delay), verb],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a preparation, and wait until its pipes are closed, which a worker that lives on would hold."""
    os.kill(fork_of(process.pid), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def finish(process: subprocess.Popen[str]) -> int:
    """Wait for a preparation, and return its peak memory in kB."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return int(output.lstrip("."))


def contents(folder: Path) -> dict[str, str]:
    """Return the checksum of each file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def finished(folder: Path, pattern: str) -> dict[Path, tuple[int, int]]:
    """Return when and as which inode each finished file was written."""
    found = (path for path in folder.rglob(pattern) if not path.name.startswith("."))
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def settings_of(folder: Path, source: Path, **changes: Any) -> DataConfig:
    return data_config(folder, source=str(source), min_characters=20, rows_per_shard=64, **changes)


def section_of(config: DataConfig) -> dict[str, Any]:
    """Return a configuration as :func:`child` takes it."""
    section: dict[str, Any] = TypeAdapter(DataConfig).dump_python(config, mode="json")
    return section
