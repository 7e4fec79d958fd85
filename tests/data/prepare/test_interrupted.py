"""Preparation that is interrupted: continued after a kill or an error with the same bytes, or nothing left behind."""

from __future__ import annotations

import shutil
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.data.manifest import Manifest, load_manifest
from dualtok.data.prepare import parts, staged
from dualtok.data.prepare.pipeline import prepare
from dualtok.data.sources.corpora import write_jsonl
from dualtok.errors import DataError
from tests.data.prepare.preparing import CHUNK, child, contents, finish, finished, kill, section_of, settings_of

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from dualtok.config.data import DataConfig


def test_running_again_returns_at_once_and_changes_nothing(prepared: Path, texts: list[str], tmp_path: Path) -> None:
    before = finished(prepared, "*")
    source = prepared.parent / "texts.jsonl"
    hidden = source.rename(tmp_path / "hidden.jsonl")
    try:
        manifest = prepare(settings_of(prepared, source, processes=2), progress=False)
    finally:
        hidden.rename(source)
    assert manifest == load_manifest(prepared)
    assert finished(prepared, "*") == before


def test_texts_staged_by_a_run_that_was_killed_at_its_very_end_do_not_stay(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    shutil.copytree(prepared, folder)
    (folder / ".staging").mkdir()
    (folder / ".staging" / "documents-000000.arrow").write_text("private text")
    config = settings_of(folder, prepared.parent / "texts.jsonl")
    prepare(config, progress=False)
    assert contents(folder) == contents(prepared)


def reached(folder: Path, pattern: str, count: int) -> bool:
    """Return whether so many files are finished and the next one is half-written."""
    try:
        return len(finished(folder, pattern)) >= count and any(folder.rglob(f".{pattern}.*.tmp"))
    except FileNotFoundError:  # what was listed has just got its final name
        return False


def kill_when(process: subprocess.Popen[str], so_far: Callable[[], bool]) -> None:
    """Kill a preparation as soon as it has come so far."""
    deadline = time.monotonic() + 120
    while not so_far():
        assert process.poll() is None, f"it ended before it could be killed: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    kill(process)


@pytest.mark.slow
def test_a_killed_preparation_continues_and_rewrites_nothing(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    source = prepared.parent / "texts.jsonl"
    section = section_of(settings_of(folder, source))
    stages: list[tuple[str, str, int]] = [
        ("documents-0?????.arrow", "ingest", 3),
        ("packed-0?????.done", "packing", 4),
        ("shard-*.arrow", "shards", 3),
        ("shard-*.arrow", "later shards", 12),
    ]
    for pattern, stage, count in stages:
        before = {**finished(folder, "documents-??????.arrow"), **finished(folder, "shard-*.arrow")}
        process = child(section, delay=0.01)
        kill_when(process, partial(reached, folder, pattern, count))
        now = {**finished(folder, "documents-??????.arrow"), **finished(folder, "shard-*.arrow")}
        assert {path: now.get(path) for path in before} == before, f"a file was written again before {stage}"
        assert len(now) > len(before)
        assert not (folder / "manifest.json").exists()
        with pytest.raises(DataError, match=r"not \(completely\) prepared"):
            load_manifest(folder)
    shards = finished(folder, "shard-*.arrow")
    assert 12 <= len(shards) < sum(len(entry.shards) for entry in load_manifest(prepared).splits.values())
    finish(child(section))
    now = finished(folder, "shard-*.arrow")
    assert {path: now[path] for path in shards} == shards
    assert contents(folder) == contents(prepared)


def test_a_bad_tokenizer_fails_before_the_corpus_is_read_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(config: DataConfig, wanted: object) -> None:
        raise AssertionError("the corpus was read first")

    monkeypatch.setattr(parts, "read_some", unread)
    source = write_jsonl(["one", "two"], tmp_path / "texts.jsonl")
    for name in ("absent.model", "./absent"):
        config = settings_of(tmp_path / "prepared", source, tokenizer=str(tmp_path / name), vocab_size=None)
        with pytest.raises(DataError, match=r"absent.*data\.tokenizer"):
            prepare(config, progress=False)
        assert sorted(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        (["a first document, long enough", "a second document, long enough"], {}, r"data\.shares\.\w+: .*split empty"),
        (["short", ""], {}, r"texts\.jsonl: empty corpus: 2 documents read, 2 too short, none left"),
        ([], {}, r"texts\.jsonl: empty corpus: 0 documents read"),
        (["text of a document"], {"field": "txt"}, r"texts\.jsonl:1: no field 'txt'"),
    ],
)
def test_a_corpus_that_cannot_be_prepared_leaves_nothing_behind(
    tmp_path: Path, lines: list[str], changes: dict[str, Any], message: str
) -> None:
    source = write_jsonl(lines, tmp_path / "texts.jsonl")
    with pytest.raises(DataError, match=message):
        prepare(settings_of(tmp_path / "prepared", source, **changes), progress=False)
    assert sorted(tmp_path.iterdir()) == [source]


def test_files_of_the_users_own_in_the_folder_stay_after_an_error(tmp_path: Path) -> None:
    source = write_jsonl(["short"], tmp_path / "texts.jsonl")
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "notes.md").write_text("mine")
    with pytest.raises(DataError, match="empty corpus"):
        prepare(settings_of(tmp_path / "prepared", source), progress=False)
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == ["notes.md"]


def test_a_corpus_mended_after_an_error_goes_on_from_there(
    prepared: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "CHUNK_DOCUMENTS", CHUNK)
    source = write_jsonl(texts, tmp_path / "texts.jsonl")
    good = source.read_bytes()
    lines = good.splitlines(keepends=True)
    lines[2 * CHUNK + 10] = b'{"text": \n'
    source.write_bytes(b"".join(lines))
    config = settings_of(tmp_path / "prepared", source)
    with pytest.raises(DataError, match=rf"texts\.jsonl:{2 * CHUNK + 11}: not valid JSON"):
        prepare(config, progress=False)
    assert len(finished(tmp_path / "prepared", "documents-*.arrow")) == 2
    assert not (tmp_path / "prepared" / "manifest.json").exists()
    source.write_bytes(good)
    manifest: Manifest = prepare(config, progress=False)
    assert manifest.splits == load_manifest(prepared).splits


def test_a_corpus_that_changed_since_an_interrupted_start_is_refused(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "CHUNK_DOCUMENTS", CHUNK)
    source = write_jsonl(texts, tmp_path / "texts.jsonl")
    lines = source.read_bytes().splitlines(keepends=True)
    broken = [*lines[: 2 * CHUNK], b'{"text": \n', *lines[2 * CHUNK :]]
    source.write_bytes(b"".join(broken))
    config = settings_of(tmp_path / "prepared", source)
    with pytest.raises(DataError, match="not valid JSON"):
        prepare(config, progress=False)
    for changed in ([*lines[:3], *lines[4:]], [lines[1], lines[0], *lines[2:]], lines[:CHUNK]):
        source.write_bytes(b"".join(changed))
        with pytest.raises(DataError, match="had read have changed"):
            prepare(config, progress=False)
