"""Each kind of file, plain and compressed, whatever ends its lines; what is not read is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from dualtok.config.data import DataConfig
from dualtok.data.sources.documents import left_out, read_documents
from dualtok.data.sources.formats import COMPRESSED, KINDS, kind_of
from dualtok.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

TEXTS = ["one, with a comma", 'two "quoted"\nand a second line', "naïve \u2013 漢字 \U0001f600", "four\ttabs"]


def read(source: Path | str, **changes: Any) -> list[str]:
    config = DataConfig(dir=str(Path(source).parent / "prepared"), source=str(source), **changes)
    return [document.text for document in read_documents(config)]


def lines(texts: list[str], end: str = "\n") -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + end for text in texts).encode()


def table(texts: list[str], delimiter: str) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerows([["id", "text"], *([str(number), text] for number, text in enumerate(texts))])
    return stream.getvalue().encode()


CONTENT: dict[str, Callable[[list[str]], bytes]] = {
    ".jsonl": lines,
    ".ndjson": lines,
    ".csv": lambda texts: table(texts, ","),
    ".tsv": lambda t: table(t, "\t"),
    ".json": lambda texts: json.dumps([{"text": text, "id": 1} for text in texts]).encode(),
}


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", CONTENT)
def test_every_kind_of_file_gives_its_texts(tmp_path: Path, suffix: str, packed: str) -> None:
    path = tmp_path / f"a{suffix}{packed}"
    path.write_bytes(PACK[packed](CONTENT[suffix](TEXTS)))
    assert read(path) == TEXTS


@pytest.mark.parametrize("packed", PACK)
def test_a_text_file_may_be_packed(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(PACK[packed](TEXTS[1].encode()))
    assert read(path) == [TEXTS[1]]


@pytest.mark.parametrize("packed", [name for name in PACK if name])
@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, packed: str, keep: float) -> None:
    path = tmp_path / f"a.jsonl{packed}"
    content = PACK[packed](lines([f"text {number} {os.urandom(8).hex()}" for number in range(5000)]))
    path.write_bytes(content[: int(len(content) * keep)] if keep else b"this was never packed, whatever its name says")
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+(:\d+)?: (damaged or cut off|not valid JSON)"):
        read(path)


def test_endings_count_in_either_case() -> None:
    assert {kind_of(Path(f"a{suffix.upper()}")) for suffix in KINDS} == set(KINDS.values())
    assert kind_of(Path("A.JsonL.GZ")) == "jsonl"
    assert [kind_of(Path(name)) for name in ("README.md", "a", "a.gz", "a.parquet.gz", "b.bak.gz")] == [None] * 5


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".json"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, suffix: str, packed: str) -> None:
    path = tmp_path / f"a{suffix}{packed}"
    path.write_bytes(PACK[packed](b"\xef\xbb\xbf" + CONTENT[suffix](TEXTS)))
    assert read(path) == TEXTS


@pytest.mark.parametrize("txt_documents", ["file", "paragraph"])
def test_nor_of_a_text_file(tmp_path: Path, txt_documents: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfonly a text")
    assert read(path, txt_documents=txt_documents) == ["only a text"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n", "\r\r"])
def test_lines_end_in_any_way(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS, end))
    assert read(path) == TEXTS
    (tmp_path / "b.txt").write_bytes(end.join(["one", "", "two"]).encode())
    assert read(tmp_path / "b.txt", txt_documents="paragraph") == ["one", "two"]
    (tmp_path / "c.csv").write_bytes(b"id,text" + end.encode() + b"1,hello" + end.encode())
    assert read(tmp_path / "c.csv") == ["hello"]


def test_mixed_line_ends_are_lines_each_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\r{"text": "two"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: field 'text' holds int"):
        read(path)


def test_many_lines_that_end_in_carriage_returns_are_read_in_pieces(tmp_path: Path) -> None:
    texts = [f"text {number} " + "x" * (number % 300) for number in range(2000)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(texts, "\r"))
    assert read(path) == texts


DEEP = 100_000


@pytest.mark.parametrize(
    "other",
    [
        "7" * 5000,
        "-" + "7" * 5000,
        "[" * DEEP + "]" * DEEP,
        '{"a":' * DEEP + "1" + "}" * DEEP,
        '"a \\"text\\" with ] and }"',
    ],
    ids=["a long number", "a long negative number", "deep lists", "deep objects", "brackets in a text"],
)
def test_what_is_not_read_may_be_as_long_and_deep_as_it_likes(tmp_path: Path, other: str) -> None:
    path = tmp_path / "a.jsonl"
    filler = "7" * 5000
    path.write_text(f'{{"before": {other}, "text": "here \\u00e9", "n": {filler}, "after": {other}}}\n')
    assert read(path) == ["here é"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"n": ' + "7" * 5000 + "}", "no field 'text'"),
        ('{"n": ' + "7" * 5000 + ', "text": 5}', "field 'text' holds"),
        ('{"n": ' + "7" * 5000 + ', "text": "x"', "not valid JSON"),
        ('{"n": ' + "7" * 5000 + ', "text": "x"} more', "not valid JSON"),
        ('{"n" ' + "7" * 5000 + ', "text": "x"}', "not valid JSON"),
        ('{"n": ' + "[" * DEEP + ', "text": "x"}', "not valid JSON"),
        ("7" * 5000, "a line must be a JSON object"),
    ],
)
def test_what_is_wrong_with_such_a_line_is_said(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:1: {message}") as caught:
        read(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('["one", "two"]', ["one", "two"]),
        ('[{"text": "one"}, "two"]', ["one", "two"]),
        ("[]", []),
        (" [ ] ", []),
        ('{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
    ],
)
def test_a_json_file_is_one_array_or_lines(tmp_path: Path, content: str, texts: list[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    assert read(path) == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "one"}, {"body": "two"}]', r"a\.json: item 1: no field 'text'"),
        ('[{"text": "one"}, 3]', r"a\.json: item 1: a line must be a JSON object"),
        ('[{"text": "one"} {"text": "two"}]', r"a\.json: item 0: not valid JSON"),
        ('[{"text": "one"}', r"a\.json: item 0: not valid JSON"),
        ('{"text": "one",\n "id": 1}', r"a\.json:1: not valid"),
    ],
)
def test_a_bad_item_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,txet\n1,x\n", r"a\.csv: no field 'text' \(did you mean 'txet'\?\)"),
        ("id,text\n1,x\n2\n", r"a\.csv: row 1: 1 cells, but the first row names 2 columns"),
        ('id,text\n1,"x\n', r"a\.csv: row 0: not valid CSV"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_a_large_cell_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'text\n"{"long " * 100_000}"\n')
    assert read(path) == ["long " * 100_000]


def test_folders_are_read_through_links_and_each_file_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (source / "a.jsonl").write_bytes(lines(["a"]))
    (source / "below" / "b.JSONL.gz").write_bytes(gzip.compress(lines(["b"])))
    (tmp_path / "elsewhere" / "c.jsonl").write_bytes(lines(["c"]))
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "twice").symlink_to(tmp_path / "elsewhere")
    (source / "circle").symlink_to(source)
    (source / "linked.jsonl").symlink_to(tmp_path / "elsewhere" / "c.jsonl")
    (source / "nowhere.jsonl").symlink_to(tmp_path / "absent")
    (source / "README.md").write_text("not a document")
    (source / "plain").write_text("not a document")
    (source / "prepared").mkdir()
    (source / "prepared" / "tokenizer.json").write_text("{}")
    config = DataConfig(dir=str(source / "prepared"), source=str(source))
    assert sorted(document.text for document in read_documents(config)) == ["a", "b", "c", "c"]
    named = {Path(line.partition(": ")[0]).name: line.partition(": ")[2] for line in left_out(config)}
    assert named == {
        "README.md": "cannot read .md",
        "plain": "cannot read files without suffix",
        "circle": "a link to a folder that is read already",
        "twice": "a link to a folder that is read already",
        "nowhere.jsonl": "not a file, or a link to nothing",
    }


@pytest.mark.parametrize("value", ["7", "null", '["x"]', '{"a": 1}'])
def test_a_streamed_dataset_never_gives_the_source_of_a_text(tmp_path: Path, value: str) -> None:
    """A value that is no text, beyond the first 10 MB of a JSON dataset, must not change the texts beside it."""
    rows = [json.dumps({"text": f"row {number} " + "x" * 3000}) for number in range(8000)]
    rows[6000] = f'{{"text": {value}}}'
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    # In a process of its own: the library looks for "json" in the working directory, and keeps a cache.
    program = """
import sys
from dualtok.config.data import DataConfig
from dualtok.data.sources.documents import read_documents
from dualtok.errors import DataError
count = 0
try:
    for document in read_documents(DataConfig(dir="unused", source="json")):
        assert document.text == f"row {count} " + "x" * 3000, document.text[:40]
        count += 1
except DataError as error:
    print("refused", error)
print(count)
"""
    outcome = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "refused json: " in outcome.stdout
    assert int(outcome.stdout.split()[-1]) <= 6000


def test_all_endings_have_a_test() -> None:
    assert {*CONTENT, ".txt", ".parquet"} == set(KINDS)
    assert set(PACK) == {"", *COMPRESSED}
