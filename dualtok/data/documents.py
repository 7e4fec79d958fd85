"""Documents in: .txt, .jsonl and .parquet files, folders of them, and streamed ``datasets`` datasets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dualtok.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from dualtok.data.config import DataConfig

SUFFIXES = (".txt", ".jsonl", ".parquet")
PARQUET_BATCH = 1024
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")


class Document(NamedTuple):
    """A text and where it came from (file and line or row), for errors."""

    text: str
    origin: str


Wanted = Callable[[int], bool]
"""Whether the document of this number is to be read; others are passed over, as cheaply as the format allows."""


class Unit(NamedTuple):
    """A piece of the source that is read without what lies before it: a file, or a row group of a Parquet file."""

    path: Path
    row_group: int | None = None


def read_documents(config: DataConfig) -> Iterator[Document]:
    """Yield the documents of ``config.source`` in a fixed order: files by name, then lines or rows.

    Raises:
        DataError: the source is missing, empty, not UTF-8, malformed, or lacks the field; names file and line or row.
    """
    return (document for document in read_some(config, lambda number: True) if document is not None)


def read_some(config: DataConfig, wanted: Wanted) -> Iterator[Document | None]:
    """Yield the documents whose place in the source is wanted, and None in place of each other one.

    What is not wanted is not checked either.

    Raises:
        DataError: as :func:`read_documents`.
    """
    files = source_files(config)
    if files is None:
        yield from _stream_dataset(config, wanted)
        return
    first = 0
    for file in files:
        count = 0
        for document in _read_file(file, config, lambda number, first=first: wanted(first + number)):  # type: ignore[misc]
            count += 1
            yield document
        first += count


def read_unit(unit: Unit, config: DataConfig) -> Iterator[Document]:
    """Yield the documents of one piece of the source.

    Raises:
        DataError: as :func:`read_documents`.
    """
    if unit.row_group is None:
        documents = _read_file(unit.path, config, lambda number: True)
    else:
        documents = _read_parquet(unit.path, config, lambda number: True, unit.row_group)
    return (document for document in documents if document is not None)


def units(config: DataConfig, at_least: int) -> list[Unit] | None:
    """Return the source cut into at least so many pieces, in order: its files, else row groups; None if it cannot be.

    Raises:
        DataError: the source is missing or empty, or a Parquet file that is to be cut cannot be read.
    """
    files = source_files(config)
    if files is None:
        return None
    pieces = [Unit(file) for file in files]
    if len(pieces) < at_least:
        pieces = [piece for file in files for piece in _row_groups(file)]
    return pieces if len(pieces) >= at_least else None


def source_files(config: DataConfig) -> list[Path] | None:
    """Return the files of the source in the order in which they are read; None for a streamed dataset.

    Raises:
        DataError: there is no such file, or no readable one in the folder.
    """
    if config.source is None:
        raise DataError("data.source: missing; give a file, a folder or the name of a dataset to prepare")
    path = Path(config.source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = _files_in(path, config)
        if not files:
            raise DataError(f"{path}: no {', '.join(SUFFIXES)} file in this folder (data.source)")
        return files
    if path.suffix in SUFFIXES or path.is_absolute() or config.source.startswith("."):
        raise DataError(f"{path}: no such file or folder (data.source)")
    return None


def _files_in(folder: Path, config: DataConfig) -> list[Path]:
    """Return the readable files of a folder by name, without those of a ``data.dir`` inside it."""
    prepared = Path(config.dir).resolve()
    files = (file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    return sorted(file for file in files if prepared not in file.resolve().parents)


def _read_file(path: Path, config: DataConfig, wanted: Wanted) -> Iterator[Document | None]:
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: cannot read {path.suffix or 'files without suffix'}; give {', '.join(SUFFIXES)}")
    yield from readers[path.suffix](path, config, wanted)


def _read_txt(path: Path, config: DataConfig, wanted: Wanted) -> Iterator[Document | None]:
    if config.txt_documents == "file":
        yield Document(_decode(path.read_bytes(), str(path)), str(path)) if wanted(0) else None
        return
    for number, (text, origin) in enumerate(_paragraphs(path)):
        yield Document(text, origin) if wanted(number) else None


def _paragraphs(path: Path) -> Iterator[tuple[str, str]]:
    paragraph: list[str] = []
    first = 1
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
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
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            origin = f"{path}:{number}"
            if _is_blank(raw, origin):
                continue
            count += 1
            yield _json_document(raw, config.field, origin) if wanted(count - 1) else None


def _is_blank(raw: bytes, origin: str) -> bool:
    first = raw.lstrip()[:1]
    if b"!" <= first <= b"~":
        return False
    return not _decode(raw, origin).strip()  # other white space than ASCII's


def _json_document(raw: bytes, field: str, origin: str) -> Document:
    try:
        row = json.loads(_decode(raw, origin))
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise DataError(f"{origin}: a line must be a JSON object with the field {field!r}")
    return Document(_text_of(row, field, origin), origin)


def _read_parquet(
    path: Path, config: DataConfig, wanted: Wanted, row_group: int | None = None
) -> Iterator[Document | None]:
    row = 0
    try:
        file = pq.ParquetFile(path)
        if config.field not in file.schema_arrow.names:
            raise DataError(_no_field(config.field, file.schema_arrow.names, str(path)))
        first = sum(file.metadata.row_group(group).num_rows for group in range(row_group or 0))
        groups = None if row_group is None else [row_group]
        for batch in file.iter_batches(batch_size=PARQUET_BATCH, row_groups=groups, columns=[config.field]):
            column = batch.column(0)
            for place in range(len(column)):
                origin = f"{path}: row {first + row}"
                yield (
                    Document(_require_text(column[place].as_py(), config.field, origin), origin)
                    if wanted(row) else None
                )  # fmt: skip
                row += 1
    except UnicodeDecodeError:
        raise DataError(f"{path}: row {row}: not UTF-8; convert the file to UTF-8") from None
    except (pa.ArrowInvalid, OSError) as error:
        after = f" after row {row}" if row else ""
        raise DataError(f"{path}: not a readable Parquet file{after}: {_reason(error)}") from None


def _row_groups(path: Path) -> list[Unit]:
    if path.suffix != ".parquet":
        return [Unit(path)]
    try:
        return [Unit(path, group) for group in range(pq.ParquetFile(path).metadata.num_row_groups)]
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {_reason(error)}") from None


def _stream_dataset(config: DataConfig, wanted: Wanted) -> Iterator[Document | None]:
    from datasets import load_dataset

    name = str(config.source)
    try:
        dataset = load_dataset(name, config.dataset_config, split=config.dataset_split, streaming=True)
        columns = dataset.column_names
    except Exception as error:  # the library raises a dozen unrelated classes for "cannot be had"
        raise DataError(f"{name}: neither a file, a folder nor a dataset that can be read: {_reason(error)}") from None
    if columns is not None and config.field not in columns:
        raise DataError(_no_field(config.field, columns, name))
    number = 0
    try:
        for number, row in enumerate(dataset):
            origin = f"{name}: row {number}"
            yield Document(_text_of(row, config.field, origin), origin) if wanted(number) else None
    except DataError:
        raise
    except Exception as error:
        # Not the library's own words, which may repeat what stands in the row.
        raise DataError(
            f"{name}: cannot be read after row {number} ({type(error).__name__}); read it with the datasets library "
            "to see why"
        ) from None


def _decode(raw: bytes, origin: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        newlines = raw.count(b"\n", 0, error.start)
        line = "" if re.search(r":\d+$", origin) else f" (line {newlines + 1})"
        raise DataError(f"{origin}: not UTF-8 at byte {error.start}{line}; convert the file to UTF-8") from None


def _text_of(row: dict[str, object], field: str, origin: str) -> str:
    if field not in row:
        raise DataError(_no_field(field, list(row), origin))
    return _require_text(row[field], field, origin)


def _require_text(value: object, field: str, origin: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{origin}: field {field!r} holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON's escapes can spell half a character, which no file could hold
        place = f"character {error.start}"
        raise DataError(f"{origin}: field {field!r} holds a lone surrogate at {place}; mend the text") from None
    return value


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _no_field(field: str, known: list[str], origin: str) -> str:
    # A JSON object may have texts for keys, which no message must repeat.
    names = [name for name in map(str, known) if NAME.fullmatch(name)]
    others = len(known) - len(names)
    fields = ", ".join([*names, *([f"{others} that are no names"] if others else [])])
    return f"{origin}: no field {field!r}{did_you_mean(field, names)}; fields are {fields} (data.field)"
