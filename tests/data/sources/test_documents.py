"""Every way in: files, folders and streamed datasets, in a fixed order, with errors that name file and line."""

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

ODD_TEXT = "naïve \u2013 漢字\u2028 \t tab \U0001f600\r\nnext \x00 line"


def read(source: Path | str, **changes: Any) -> list[tuple[str, str]]:
    """Return (text, origin) of all documents of a source."""
    config = DataConfig(dir="unused", source=str(source), **changes)
    return [(document.text, document.origin) for document in read_documents(config)]


def write_lines(path: Path, *rows: object) -> Path:
    """Write a .jsonl file; strings are lines as they are, anything else becomes JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8"))
    return path


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), column: pa.array(texts, pa.string())}), path)
    return path


def test_a_txt_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(ODD_TEXT.encode())
    assert read(path) == [(ODD_TEXT, str(path))]


def test_paragraphs_of_a_txt_file_are_documents_named_by_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\nfirst\nsecond line\r\n\r\n  \t\n  third\n\n\n\nlast, no newline")
    assert read(path, txt_documents="paragraph") == [
        ("first\nsecond line", f"{path}:3"),
        ("third", f"{path}:7"),
        ("last, no newline", f"{path}:11"),
    ]


def test_a_jsonl_file_gives_its_field_line_by_line(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", {"id": 1, "text": ODD_TEXT}, "", "   ", {"text": ""}, '{"text": "\\u00e9"}'
    )
    assert read(path) == [(ODD_TEXT, f"{path}:1"), ("", f"{path}:4"), ("é", f"{path}:5")]
    other = write_lines(tmp_path / "b.jsonl", {"body": "here", "text": "not here"})
    assert read(other, field="body") == [("here", f"{other}:1")]


def test_a_parquet_file_gives_its_column_row_by_row(tmp_path: Path) -> None:
    texts: list[str | None] = [f"row {number} {ODD_TEXT}" for number in range(2500)]
    path = write_parquet(tmp_path / "a.parquet", texts, column="body")
    assert read(path, field="body") == [(text, f"{path}: row {row}") for row, text in enumerate(texts)]


def test_a_folder_is_read_by_file_name_whatever_the_order_of_writing(tmp_path: Path) -> None:
    def fill(folder: Path, names: list[str]) -> Path:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                write_parquet(path, [f"{name} 0", f"{name} 1"])
            elif path.suffix == ".jsonl":
                write_lines(path, {"text": f"{name} 0"}, {"text": f"{name} 1"})
            else:
                path.write_text(f"{name} 0")
        return folder

    names = ["a/2.parquet", "a/1.txt", "b.jsonl", "a/10.jsonl", "README.md", "c.TXT", "d.txt/inner.txt"]
    first = fill(tmp_path / "first", names)
    second = fill(tmp_path / "second", names[::-1])
    expected = [
        "a/1.txt 0",
        "a/10.jsonl 0",
        "a/10.jsonl 1",
        "a/2.parquet 0",
        "a/2.parquet 1",
        "b.jsonl 0",
        "b.jsonl 1",
        "c.TXT 0",
        "d.txt/inner.txt 0",
    ]
    assert [text for text, _ in read(first)] == [text for text, _ in read(second)] == expected


def test_documents_are_drawn_only_as_they_are_wanted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "first"}, "not JSON")
    documents = read_documents(DataConfig(dir="unused", source=str(path)))
    assert next(documents).text == "first"
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        next(documents)


def test_a_datasets_dataset_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # "json" names no file or folder here but a builder of the datasets library, which finds the data files of the
    # working directory: the library's own streaming, without a hub.
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"row {number} {ODD_TEXT}", "id": number} for number in range(50)]
    write_lines(tmp_path / "train.jsonl", *rows)
    write_lines(tmp_path / "test.jsonl", {"text": "other split", "id": 0})
    calls: list[dict[str, Any]] = []
    load = datasets.DatasetBuilder.as_streaming_dataset

    def spy(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return load(*arguments, **options)

    monkeypatch.setattr(datasets.DatasetBuilder, "as_streaming_dataset", spy)
    assert read("json") == [(row["text"], f"json: row {number}") for number, row in enumerate(rows)]
    assert [text for text, _ in read("json", dataset_split="test")] == ["other split"]
    assert len(calls) == 2
    with pytest.raises(DataError, match=r"json.*no field 'txt' \(did you mean 'text'\?\).*data\.field"):
        read("json", field="txt")
    with pytest.raises(DataError, match=r"json: neither a file, a folder nor a dataset.*absent"):
        read("json", dataset_split="absent")


def test_a_dataset_that_breaks_on_the_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "train.jsonl", {"text": "fine"}, '{"text": ')
    with pytest.raises(DataError, match=r"json"):
        read("json")


def test_a_name_that_is_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("absent.jsonl", "./absent", str(tmp_path / "absent")):
        with pytest.raises(DataError, match=r"absent.*no such file or folder \(data\.source\)"):
            read(name)
    with pytest.raises(DataError, match=r"data\.source: missing"):
        list(read_documents(DataConfig(dir="unused")))


def test_a_folder_or_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file in this folder that can be read \(\.txt, \.jsonl, "):
        read(tmp_path)
    (tmp_path / "a.docx").write_text("hello")
    with pytest.raises(DataError, match=r"a\.docx: cannot read \.docx"):
        read(tmp_path / "a.docx")
    (tmp_path / "plain").write_text("hello\n")
    with pytest.raises(DataError, match=r"plain: cannot read files without suffix"):
        read(tmp_path / "plain")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txet": "x", "id": 1}, r"no field 'text' \(did you mean 'txet'\?\); fields are txet, id \(data\.field\)"),
        ({"body": "x"}, r"no field 'text'; fields are body"),
        ({"text": None}, r"field 'text' holds NoneType, not text"),
        ({"text": ["x"]}, r"field 'text' holds list, not text"),
        ({"text": 1.5}, r"field 'text' holds float, not text"),
        (["text"], r"a line must be a JSON object with the field 'text'"),
        ("{'text': 'x'}", r"not valid JSON: .* at column 2"),
        ('{"text": "x"', r"not valid JSON"),
        ('{"text": "a lone \\ud83d surrogate"}', r"field 'text' .*surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: object, message: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "one"}, "", row, {"text": "four"})
    with pytest.raises(DataError, match=rf"a\.jsonl:3: {message}"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("txt_documents", ["file", "paragraph"])
def test_invalid_utf8_names_its_line(tmp_path: Path, name: str, txt_documents: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "one"}\n\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"not UTF-8 at byte \d+.*convert the file to UTF-8") as caught:
        read(path, txt_documents=txt_documents)
    assert f"{path}:3:" in str(caught.value) or (str(path) in str(caught.value) and "(line 3)" in str(caught.value))


def test_a_parquet_column_or_value_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["x"], column="texts")
    with pytest.raises(
        DataError, match=r"a\.parquet: no field 'text' \(did you mean 'texts'\?\); fields are id, texts"
    ):
        read(path)
    path = write_parquet(tmp_path / "b.parquet", ["x", "y", None])
    with pytest.raises(DataError, match=r"b\.parquet: row 2: field 'text' holds NoneType"):
        read(path)
    with pytest.raises(DataError, match=r"b\.parquet: row 0: field 'id' holds int"):
        read(path, field="id")


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "altered page"])
def test_an_unreadable_parquet_file_is_named(tmp_path: Path, damage: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", [f"some text {number}" for number in range(5000)])
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "garbage": b"x" * 5000,
            "truncated": content[:-50],
            "empty": b"",
            "altered page": content[:middle] + b"\xff" * 4000 + content[middle + 4000 :],
        }[damage]
    )
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        read(path)
