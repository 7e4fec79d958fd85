"""What files hold: text, JSON lines, JSON arrays, CSV and Parquet, each document with the place that it came from.

All but Parquet may be compressed (.gz, .bz2, .xz, .zst). Endings count in either case. A byte-order mark is no part of
the text, and a line may end in a line feed, a carriage return, or both.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dualtok.data.sources.json_fields import after_value, after_white, only_field
from dualtok.data.sources.rows import Document, document_of, reason_of, require_fields, require_text, require_text_rows
from dualtok.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.config.data import DataConfig

KINDS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES_IN_WORDS = f"{', '.join(KINDS)}; all but .parquet also as {', '.join(COMPRESSED)}"
PARQUET_BATCH = 1024
HEAD_BYTES = 1 << 16
"""What is looked at to learn how a file's lines end."""
MARK = "\ufeff".encode()
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowInvalid)
"""What the libraries raise on a compressed file that is cut off or is none."""


Wanted = Callable[[int], bool]
"""Whether the document of this number is to be read; others are passed over, as cheaply as the format allows."""


def kind_of(path: Path) -> str | None:
    """Return what a file holds by its name, or None if it cannot be read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        kind = KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if kind == "parquet" else kind
    return KINDS.get(suffixes[-1]) if suffixes else None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file as it was before it was compressed.

    Raises:
        DataError: it is cut off or damaged.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":
            with pa.OSFile(str(path)) as raw, pa.CompressedInputStream(raw, "zstd") as stream:
                yield io.BufferedReader(_Raw(stream), HEAD_BYTES)
            return
        opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)
        with opener(path, "rb") as stream:
            yield stream
    except DAMAGED as error:
        if suffix in COMPRESSED:
            raise DataError(f"{path}: damaged or cut off: {reason_of(error)}; get the file again") from None
        raise


class _Raw(io.RawIOBase):
    """pyarrow's stream as one that the standard library can buffer."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._stream.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number (from 1) and content of each line, without a byte-order mark, with whatever ends it."""
    number = 0
    with _opened(path) as stream:
        head = stream.peek(HEAD_BYTES)[:HEAD_BYTES] if hasattr(stream, "peek") else b""
        only_returns = b"\r" in head and b"\n" not in head
        for raw in _split_at_returns(stream) if only_returns else stream:
            line = raw.removeprefix(MARK) if number == 0 else raw
            for one in line.splitlines(keepends=True) if b"\r" in line.rstrip(b"\r\n") else (line,):
                number += 1
                yield number, one


def _split_at_returns(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a stream that end in carriage returns alone."""
    rest = b""
    while block := stream.read(HEAD_BYTES):
        *lines, rest = (rest + block).split(b"\r")
        yield from (line + b"\r" for line in lines)
    if rest:
        yield rest


def _read_txt(path: Path, config: DataConfig, wanted: Wanted) -> Iterator[Document | None]:
    require_text_rows(config, str(path))
    if config.group_field is not None:
        raise DataError(
            f"{path}: a text file has no field {config.group_field!r} (data.group_field); give JSON, CSV or Parquet, "
            "or leave data.group_field out"
        )
    if config.txt_documents == "file":
        if not wanted(0):
            yield None
            return
        with _opened(path) as stream:
            content = stream.read()
        yield Document(_decode(content.removeprefix(MARK), str(path)), str(path))
        return
    for number, (text, origin) in enumerate(_paragraphs(path)):
        yield Document(text, origin) if wanted(number) else None


def _paragraphs(path: Path) -> Iterator[tuple[str, str]]:
    paragraph: list[str] = []
    first = 1
    for number, raw in _lines(path):
        line = _decode(raw, f"{path}:{number}")
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).strip(), f"{path}:{first}"
            paragraph = []
    if paragraph:
        yield "".join(paragraph).strip(), f"{path}:{first}"


def _read_jsonl(path: Path, config: DataConfig, wanted: Wanted) -> Iterator[Document | None]:
    count = 0
    for number, raw in _lines(path):
        origin = f"{path}:{number}"
        if _is_blank(raw, origin):
            continue
        count += 1
        yield _json_document(_decode(raw, origin), config, origin) if wanted(count - 1) else None


def _is_blank(raw: bytes, origin: str) -> bool:
    first = raw.lstrip()[:1]
    if b"!" <= first <= b"~":
        return False
    return not _decode(raw, origin).strip()  # other white space than ASCII's


def _json_document(text: str, config: DataConfig, origin: str) -> Document:
    field = config.field
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError):  # a number or a nesting beyond Python's limits, in whatever field
        row = only_field(text, field, origin, config.group_field)
    if not isinstance(row, dict):
        raise DataError(f"{origin}: a line must be a JSON object with the field {field!r}")
    return document_of(row, config, origin)


def _read_json(path: Path, config: DataConfig, wanted: Wanted) -> Iterator[Document | None]:
    """Read one array of objects or texts, which is held in memory; or, under this name, JSON lines."""
    with _opened(path) as stream:
        head = stream.read(HEAD_BYTES).removeprefix(MARK).lstrip()
        rest = stream.read() if head.startswith(b"[") else b""
    if not head.startswith(b"["):
        yield from _read_jsonl(path, config, wanted)
        return
    text = _decode(head + rest, str(path))
    decoder, position, number = json.JSONDecoder(), after_white(text, 1), 0
    while text[position : position + 1] != "]":
        origin = f"{path}: item {number}"
        try:
            end = after_value(text, position)
            item = text[position:end]
            position = after_white(text, end)
            if text[position] == ",":
                position = after_white(text, position + 1)
            elif text[position] != "]":
                raise ValueError("no comma")
        except (ValueError, IndexError):
            raise DataError(f"{origin}: not valid JSON at character {position}") from None
        if not wanted(number):
            yield None
        elif item.startswith('"'):
            require_text_rows(config, origin)
            yield Document(require_text(_string(decoder, item, origin), config.field, origin), origin)
        else:
            yield _json_document(item, config, origin)
        number += 1


def _string(decoder: json.JSONDecoder, item: str, origin: str) -> object:
    try:
        return decoder.decode(item)
    except ValueError as error:
        raise DataError(f"{origin}: not valid JSON: {reason_of(error)}") from None


def _read_csv(path: Path, config: DataConfig, wanted: Wanted, delimiter: str = ",") -> Iterator[Document | None]:
    """Read a table whose first row names the columns; a quoted cell may hold line ends."""
    csv.field_size_limit(sys.maxsize)
    with _opened(path) as stream:
        rows = csv.reader(_decoded_lines(stream, path), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        columns: list[str] = []
        number = 0
        try:
            for row in rows:
                if header is None:
                    header = row
                    columns = require_fields(config, header, str(path))
                    continue
                if not row:  # a blank line
                    continue
                origin = f"{path}: row {number}"
                if len(row) != len(header):
                    raise DataError(f"{origin}: {len(row)} cells, but the first row names {len(header)} columns")
                yield (
                    document_of({name: row[header.index(name)] for name in columns}, config, origin)
                    if wanted(number)
                    else None
                )
                number += 1
        except csv.Error as error:
            raise DataError(f"{path}: row {number}: not valid CSV: {error}") from None


def _read_tsv(path: Path, config: DataConfig, wanted: Wanted) -> Iterator[Document | None]:
    return _read_csv(path, config, wanted, delimiter="\t")


def _decoded_lines(stream: BinaryIO, path: Path) -> Iterator[str]:
    head = stream.peek(HEAD_BYTES)[:HEAD_BYTES] if hasattr(stream, "peek") else b""
    lines = _split_at_returns(stream) if b"\r" in head and b"\n" not in head else stream
    for number, raw in enumerate(lines, start=1):
        yield _decode(raw.removeprefix(MARK) if number == 1 else raw, f"{path}:{number}")


def read_parquet(
    path: Path, config: DataConfig, wanted: Wanted, row_group: int | None = None
) -> Iterator[Document | None]:
    """Yield the documents of a Parquet file, or of one of its row groups."""
    row = 0
    try:
        file = pq.ParquetFile(path)
        columns = require_fields(config, file.schema_arrow.names, str(path))
        first = sum(file.metadata.row_group(group).num_rows for group in range(row_group or 0))
        groups = None if row_group is None else [row_group]
        for batch in file.iter_batches(batch_size=PARQUET_BATCH, row_groups=groups, columns=columns):
            names = batch.schema.names
            for position in range(batch.num_rows):
                origin = f"{path}: row {first + row}"
                values = (
                    {name: batch.column(names.index(name))[position].as_py() for name in columns}
                    if wanted(row)
                    else None
                )
                yield None if values is None else document_of(values, config, origin)
                row += 1
    except UnicodeDecodeError:
        raise DataError(f"{path}: row {row}: not UTF-8; convert the file to UTF-8") from None
    except (pa.ArrowInvalid, OSError) as error:
        after = f" after row {row}" if row else ""
        raise DataError(f"{path}: not a readable Parquet file{after}: {reason_of(error)}") from None


READERS: dict[str, Callable[[Path, DataConfig, Wanted], Iterator[Document | None]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": read_parquet,
}
"""Kind of :func:`kind_of` -> what reads it."""


def _decode(raw: bytes, origin: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        newlines = raw.count(b"\n", 0, error.start)
        line = "" if re.search(r":\d+$", origin) else f" (line {newlines + 1})"
        raise DataError(f"{origin}: not UTF-8 at byte {error.start}{line}; convert the file to UTF-8") from None
