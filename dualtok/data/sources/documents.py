"""Documents in: text, JSON, CSV and Parquet files, folders of them, and streamed ``datasets`` datasets.

What each kind of file holds is read in :mod:`.formats`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dualtok.data.sources.formats import READERS, SUFFIXES_IN_WORDS, Wanted, kind_of, read_parquet
from dualtok.data.sources.rows import Document, document_of, reason_of, require_fields
from dualtok.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dualtok.config.data import DataConfig

# Imported where they are used, for what they take to load: datasets (1 s).


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
        documents = read_parquet(unit.path, config, lambda number: True, unit.row_group)
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
            raise DataError(f"{path}: no file in this folder that can be read ({SUFFIXES_IN_WORDS}) (data.source)")
        return files
    if kind_of(path) or path.is_absolute() or config.source.startswith("."):
        raise DataError(f"{path}: no such file or folder (data.source)")
    return None


def left_out(config: DataConfig) -> list[str]:
    """Return the files of a source folder that are not read, each with the reason; none of another kind of source."""
    path = Path(config.source or "")
    return [f"{file}: {reason}" for file, reason in _walk(path, config) if reason] if path.is_dir() else []


def _files_in(folder: Path, config: DataConfig) -> list[Path]:
    """Return the readable files of a folder by name, without those of a ``data.dir`` inside it."""
    return sorted(file for file, reason in _walk(folder, config) if not reason)


def _walk(folder: Path, config: DataConfig) -> Iterator[tuple[Path, str]]:
    """Yield the files below a folder, through links as well, with why one is not read, or nothing.

    A folder that is reached twice is read where it is reached first in the order of the names.
    """
    prepared, seen = Path(config.dir).resolve(), {folder.resolve()}
    for name, folders, files in os.walk(folder, followlinks=True):
        here = Path(name)
        kept = []
        for below in sorted(folders):
            real = (here / below).resolve()
            if real == prepared:
                continue
            if real in seen:
                yield here / below, "a link to a folder that is read already"
                continue
            seen.add(real)
            kept.append(below)
        folders[:] = kept
        for file in sorted(files):
            path = here / file
            if path.is_file():
                yield path, "" if kind_of(path) else f"cannot read {path.suffix or 'files without suffix'}"
            else:
                yield path, "not a file, or a link to nothing"


def _read_file(path: Path, config: DataConfig, wanted: Wanted) -> Iterator[Document | None]:
    kind = kind_of(path)
    if kind is None:
        raise DataError(f"{path}: cannot read {path.suffix or 'files without suffix'}; give {SUFFIXES_IN_WORDS}")
    yield from READERS[kind](path, config, wanted)


def _row_groups(path: Path) -> list[Unit]:
    if kind_of(path) != "parquet":
        return [Unit(path)]
    try:
        return [Unit(path, group) for group in range(pq.ParquetFile(path).metadata.num_row_groups)]
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {reason_of(error)}") from None


def _stream_dataset(config: DataConfig, wanted: Wanted) -> Iterator[Document | None]:
    from datasets import load_dataset_builder

    name = str(config.source)
    try:
        builder = load_dataset_builder(name, config.dataset_config)
        if hasattr(builder.config, "on_mixed_types"):
            # Else one value that is no text makes every text of its 10 MB the JSON source of itself, without a word.
            builder.config.on_mixed_types = None
        dataset = builder.as_streaming_dataset(split=config.dataset_split)
        columns = dataset.column_names
    except Exception as error:  # the library raises a dozen unrelated classes for "cannot be had"
        raise DataError(
            f"{name}: neither a file, a folder nor a dataset that can be read: {reason_of(error)}"
        ) from None
    if columns is not None:
        require_fields(config, columns, name)
    number = 0
    try:
        for number, row in enumerate(dataset):
            origin = f"{name}: row {number}"
            yield document_of(row, config, origin) if wanted(number) else None
    except DataError:
        raise
    except Exception as error:
        # Not the library's own words, which may repeat what stands in the row.
        raise DataError(
            f"{name}: cannot be read after row {number} ({type(error).__name__}), e.g. because a field holds values of "
            "several types there; read it with the datasets library to see why, or give its files themselves"
        ) from None
