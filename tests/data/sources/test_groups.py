"""Whose a document is, read from every kind of source."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dualtok.config.data import DataConfig
from dualtok.data.sources.documents import read_documents
from dualtok.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path


def groups(source: Path, **changes: Any) -> list[str | None]:
    config = DataConfig(dir=str(source.parent / "prepared"), source=str(source), group_field="person", **changes)
    return [document.group for document in read_documents(config)]


def test_json_has_texts_whole_numbers_and_nobodys(tmp_path: Path) -> None:
    rows = [{"text": "a", "person": who} for who in ("Ann", 17, None, "", 3.0)] + [{"text": "b"}]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert groups(file) == ["Ann", "17", None, None, "3", None]
    array = tmp_path / "a.json"
    array.write_text(json.dumps([*rows[:2], "no object"]))
    assert groups(array) == ["Ann", "17", None]
    file.write_text('{"text": "a", "id": 1' + "0" * 5000 + ', "person": "Ann"}\n{"person": 7, "text": "b", "id": -1}\n')
    assert groups(file) == ["Ann", "7"]
    file.write_text('{"person": 12, "text": "a", "id": 1' + "0" * 5000 + "}\n")
    assert groups(file) == ["12"]


@pytest.mark.parametrize("value", [True, 1.5, ["Ann"], {"name": "Ann"}])
def test_what_is_no_name_is_refused_without_repeating_it(tmp_path: Path, value: object) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "a", "person": value}) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'person' holds \w+, not the name of a group") as caught:
        groups(file)
    assert "Ann" not in str(caught.value)


def test_tables_have_a_column_for_it(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("person,text,text\nAnn,a,x\n,b,x\n")
    assert groups(file) == ["Ann", None]
    assert [d.text for d in read_documents(DataConfig(dir="x", source=str(file), group_field="person"))] == ["a", "b"]
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1, 2, 3], "person": [7.0, float("nan"), None], "text": ["a", "b", "c"]}), table)
    assert groups(table) == ["7", None, None]
    pq.write_table(pa.table({"persons": [1], "text": ["a"]}), table)
    with pytest.raises(DataError, match=r"no field 'person' .did you mean 'persons'.*\(data\.group_field\)"):
        groups(table)
    file.write_text("who,text\nAnn,a\n")
    with pytest.raises(DataError, match=r"no field 'person'.*\(data\.group_field\)"):
        groups(file)


def test_text_files_have_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a\.txt: a text file has no field 'person' \(data\.group_field\)"):
        groups(tmp_path / "a.txt")


def test_the_text_is_no_group() -> None:
    with pytest.raises(ValueError, match=r"data\.group_field: 'text' is also data\.field"):
        DataConfig(dir="x", group_field="text")
