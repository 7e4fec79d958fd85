"""Files are whole or absent."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from dualtok.files import atomic_file, atomic_folder, file_sha256, locked, write_text
from tests.support import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    write_text(path, "old")

    def fail_halfway() -> None:
        with atomic_file(path) as stream:
            stream.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.bin"
    with atomic_file(path) as stream:
        stream.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert file_sha256(path) == hashlib.sha256(b"content").hexdigest()


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_folder(path) as folder:
        (folder / "old").write_text("old")
        assert not path.exists()

    def fail_halfway() -> None:
        with atomic_folder(path) as folder:
            (folder / "new").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert [file.name for file in path.iterdir()] == ["old"]
    with atomic_folder(path) as folder:
        (folder / "new").write_text("new")
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


HOLDER = """
import sys, time
from pathlib import Path
from dualtok.files import locked
with locked(Path(sys.argv[1]), "the holder", print):
    print("holding", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def holder(path: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds a lock."""
    command = [sys.executable, "-c", HOLDER, str(path), str(seconds)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "holding\n"
            yield process
        finally:
            process.kill()


class TakenError(Exception):
    """Somebody else has the lock."""


def refuse(holder: str) -> None:
    raise TakenError(holder)


def test_a_lock_is_refused_while_another_process_has_it_and_free_once_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path, 60) as process:
        with pytest.raises(TakenError, match=r"^the holder$"), locked(path, "this", refuse):
            raise AssertionError("the lock is held twice")
        assert path.read_text() == "the holder\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locked(path, "this", refuse):
            assert path.read_text() == "this\n"


def test_who_waits_is_told_once_for_whom_and_then_has_the_lock(tmp_path: Path) -> None:
    path, told = tmp_path / "lock", list[str]()
    with holder(path, 3.0):
        started = time.monotonic()
        with locked(path, "this", told.append, patience=0.1):
            assert time.monotonic() - started > 0.5
    assert told == ["the holder"]
    with locked(path, "this", told.append, patience=60):
        pass
    assert told == ["the holder"], "the lock was released at the end"


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_unguarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", fail)
    path = tmp_path / "lock"
    for _ in range(2):
        with locked(path, "first", refuse), locked(path, "second", refuse):
            assert path.read_text() == "second\n", "a plain file, not one that says by being there that it is locked"


def test_a_lock_file_that_may_not_be_opened_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(PermissionError), locked(tmp_path / "lock", "this", refuse):
        raise AssertionError("held without a lock")
