"""The manifest vouches for every file, and is refused when it cannot be trusted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.data.manifest import (
    CHAT_FORMAT_VERSION,
    FORMAT_VERSION,
    MANIFEST,
    check_shard,
    load_manifest,
    save_manifest,
    split_entry,
)
from dualtok.errors import DataError
from tests.data.support import whole_documents, write_prepared

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Return a small prepared folder."""
    return write_prepared(tmp_path / "prepared", whole_documents(10), lanes=2, rows_per_shard=3)


def rewrite(folder: Path, **changes: Any) -> None:
    """Change top-level values of a manifest."""
    values = json.loads((folder / MANIFEST).read_text())
    values.update(changes)
    (folder / MANIFEST).write_text(json.dumps(values))


def test_a_manifest_comes_back_as_it_was_saved(prepared: Path, tmp_path: Path) -> None:
    manifest = load_manifest(prepared)
    (tmp_path / "copy").mkdir()
    save_manifest(manifest, tmp_path / "copy")
    assert load_manifest(str(tmp_path / "copy")) == manifest
    assert manifest.splits["train"].blocks == 10
    assert split_entry(manifest, "train", prepared) is manifest.splits["train"]


def test_an_unprepared_folder_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: missing.*run `dualtok prepare`"):
        load_manifest(tmp_path)
    with pytest.raises(DataError, match=r"manifest\.json: missing.*run `dualtok prepare`"):
        load_manifest(tmp_path / "absent")


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"corpus\.jsonl/manifest\.json: missing"):
        load_manifest(tmp_path / "corpus.jsonl")


@pytest.mark.parametrize("version", [CHAT_FORMAT_VERSION + 1, 0, None, "1"])
def test_another_format_version_is_refused(prepared: Path, version: object) -> None:
    rewrite(prepared, format_version=version)
    with pytest.raises(DataError, match=rf"format version {version}, this dualtok reads {FORMAT_VERSION}"):
        load_manifest(prepared)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"text"', b'{"format_version": 1}', b'{"format_version": 1, "a": "\xe9"}']
)
def test_a_malformed_manifest_is_refused_by_name(prepared: Path, content: bytes) -> None:
    (prepared / MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json: malformed"):
        load_manifest(prepared)


@pytest.mark.parametrize("changes", [{"surplus": 1}, {"lanes": "many"}, {"splits": {"train": {"documents": 1}}}])
def test_values_that_do_not_belong_are_refused(prepared: Path, changes: dict[str, Any]) -> None:
    rewrite(prepared, **changes)
    with pytest.raises(DataError, match=r"manifest\.json: malformed"):
        load_manifest(prepared)


def test_a_missing_split_is_named_with_those_there_are(prepared: Path) -> None:
    with pytest.raises(DataError, match=r"without split 'auxiliary' \(it has train\); add it to data.shares"):
        split_entry(load_manifest(prepared), "auxiliary", prepared)


@pytest.mark.parametrize(
    ("damage", "message"),
    [("altered", "checksum"), ("truncated", "bytes, the manifest says"), ("missing", "shard is missing")],
)
def test_each_damaged_shard_is_named(prepared: Path, damage: str, message: str) -> None:
    shards = load_manifest(prepared).splits["train"].shards
    assert len(shards) == 4
    for shard in shards:
        path = prepared / "train" / shard.file
        content = path.read_bytes()
        check_shard(path, shard)
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(content[:-1])
        else:
            path.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
        with pytest.raises(DataError, match=rf"{shard.file}.*{message}"):
            check_shard(path, shard)
        path.write_bytes(content)
        check_shard(path, shard)


def test_without_hashing_only_the_size_is_compared(prepared: Path) -> None:
    shard = load_manifest(prepared).splits["train"].shards[0]
    path = prepared / "train" / shard.file
    path.write_bytes(b"x" * shard.bytes)
    check_shard(path, shard, hashed=False)
    with pytest.raises(DataError, match="checksum"):
        check_shard(path, shard)
