"""``data.group_field``: whose each document is, kept with it, and all of a group's documents on one side."""

from __future__ import annotations

import json
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.data.folder import DataFolder
from dualtok.data.manifest import load_manifest
from dualtok.data.prepare import groups, staged
from dualtok.data.prepare.ingest import stage_part, staged_files
from dualtok.data.prepare.parallel import Workers
from dualtok.data.prepare.parts import ALONE, Part, PartReader
from dualtok.data.prepare.pipeline import STAGING, finish, prepare, prepare_part
from dualtok.data.prepare.splits import assign_split, content_digest
from dualtok.errors import ConfigError, DataError
from dualtok.monitor.progress import RunProgress
from tests.data.prepare.preparing import CHUNK, contents, settings_of, sha256
from tests.data.support import SHARES

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.config.data import DataConfig


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged, "CHUNK_DOCUMENTS", CHUNK)
    monkeypatch.setattr(groups, "RUN_DOCUMENTS", 3 * CHUNK)


@pytest.fixture
def rows(texts: list[str]) -> list[dict[str, Any]]:
    """Documents of 60 persons, one in five of nobody; duplicates have other persons than what they repeat."""
    draw = random.Random(1)
    found = [{"text": text} for text in texts[: 5 * CHUNK]]
    return [row if draw.random() < 0.2 else {**row, "person": draw.randrange(60)} for row in found]


@pytest.fixture
def config(rows: list[dict[str, Any]], prepared: Path, tmp_path: Path) -> DataConfig:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return with_groups(tmp_path / "grouped", source, prepared)


def with_groups(folder: Path, source: Path, prepared: Path, **changes: Any) -> DataConfig:
    changes = {"group_field": "person", **changes}
    return settings_of(folder, source, tokenizer=str(prepared / "tokenizer"), vocab_size=None, **changes)


def persons(folder: str) -> dict[str, list[str | None]]:
    return {s: DataFolder(folder).documents(s)["group"].to_pylist() for s in load_manifest(folder).splits}


def test_no_group_is_in_two_splits_and_each_document_keeps_its_own(
    config: DataConfig, rows: list[dict[str, Any]]
) -> None:
    prepare(config, progress=False)
    found = persons(config.dir)
    names = [set(side) - {None} for side in found.values()]
    assert sum(map(len, names)) == len(set.union(*names)) > 50
    first: dict[str, Any] = {}
    for row in rows:
        first.setdefault(sha256(row["text"]), row.get("person"))
    for split in found:
        table = DataFolder(config.dir).documents(split)
        for digest, group in zip(table["sha256"].to_pylist(), table["group"].to_pylist(), strict=True):
            assert group == (None if first[digest] is None else str(first[digest]))
            dealt = digest if group is None else content_digest(group).hex()
            assert assign_split(bytes.fromhex(dealt), SHARES, config.seed) == split
    assert any(None in side for side in found.values())


def test_parts_and_interrupted_starts_give_the_same_bytes(
    config: DataConfig, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(config, progress=False)
    source = tmp_path / "rows.jsonl"
    parts = with_groups(tmp_path / "parts", source, prepared)
    for number in (2, 1):
        prepare_part(parts, Part(number, 2), progress=False)
    finish(parts, progress=False)
    assert contents(tmp_path / "parts") == contents(tmp_path / "grouped")
    again = with_groups(tmp_path / "again", source, prepared)
    folder = ALONE.folder(tmp_path / "again" / STAGING)
    folder.mkdir(parents=True)
    with Workers(1) as workers, RunProgress("", None, active=False) as bar:
        stage_part(again, PartReader(again, ALONE), folder, workers, progress=bar)
    (folder / "complete.json").unlink()
    staged_files(folder)[-1].unlink()
    shutil.copytree(folder, tmp_path / "kept")
    prepare(again, progress=False)
    assert contents(tmp_path / "again") == contents(tmp_path / "grouped")
    shutil.copytree(tmp_path / "kept", ALONE.folder(tmp_path / "third" / STAGING))
    changed = source.read_text().replace('"person": ', '"person": 1', 1)
    source.write_text(changed)
    with pytest.raises(DataError, match=r"the documents that an interrupted start had read have changed"):
        prepare(with_groups(tmp_path / "third", source, prepared), progress=False)


def test_without_it_the_table_has_no_such_column_and_another_field_needs_another_folder(
    config: DataConfig, prepared: Path, tmp_path: Path
) -> None:
    assert "group" not in DataFolder(prepared).documents("train").column_names
    plain = with_groups(tmp_path / "plain", tmp_path / "rows.jsonl", prepared, group_field=None)
    prepare(plain, progress=False)
    echo = tmp_path / "plain" / "prepare.json"
    earlier = {key: value for key, value in json.loads(echo.read_text()).items() if key != "group_field"}
    echo.write_text(json.dumps(earlier))  # as a version wrote it that knew of no groups
    prepare(plain, progress=False)
    with pytest.raises(ConfigError, match=r"data\.group_field: 'person', but .* was prepared with None"):
        prepare(with_groups(tmp_path / "plain", tmp_path / "rows.jsonl", prepared), progress=False)


def test_a_name_that_no_document_has_is_refused(config: DataConfig, prepared: Path, tmp_path: Path) -> None:
    wrong = with_groups(tmp_path / "wrong", tmp_path / "rows.jsonl", prepared, group_field="persn")
    with pytest.raises(DataError, match=r"no document has a field 'persn' that names its group \(data\.group_field\)"):
        prepare(wrong, progress=False)
    assert not (tmp_path / "wrong").exists()
