"""Locks that nobody holds are removed; others never."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from dualtok.distributed import operators
from dualtok.errors import DualtokError

if TYPE_CHECKING:
    from pathlib import Path


def lock(folder: Path) -> Path:
    path = folder / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_a_lock_of_a_killed_compilation_is_removed(tmp_path: Path) -> None:
    deep = lock(tmp_path / "py311_cpu")
    flat = lock(tmp_path)
    assert sorted(operators.remove_stale_locks(tmp_path)) == sorted([flat, deep])
    assert not flat.exists()
    assert not deep.exists()


def test_a_lock_that_a_process_holds_stays(tmp_path: Path) -> None:
    held = lock(tmp_path)
    code = "import sys; file = open(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as it:
        assert it.stdout is not None
        it.stdout.readline()
        assert operators.remove_stale_locks(tmp_path) == []
        assert held.exists()
        it.communicate()
    assert operators.remove_stale_locks(tmp_path) == [held]


def test_on_a_shared_file_system_it_is_named_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = lock(tmp_path)
    monkeypatch.setattr(operators, "is_shared", lambda path: True)
    with pytest.raises(DualtokError, match=r"deepspeed_shm_comm/lock: a lock .* remove it .*TORCH_EXTENSIONS_DIR"):
        operators.remove_stale_locks(tmp_path)
    assert left.exists()


def test_a_start_clears_the_way_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = lock(tmp_path)
    monkeypatch.setitem(os.environ, "TORCH_EXTENSIONS_DIR", str(tmp_path))
    operators.clear_stale_locks()
    assert f"removed {stale}" in capsys.readouterr().err
