"""Files are whole or absent."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from dualtok.files import atomic_file, atomic_folder, file_sha256, write_text

if TYPE_CHECKING:
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
