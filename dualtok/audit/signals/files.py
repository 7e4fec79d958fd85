"""Per-token values of documents as Parquet: one row per document, its values as lists, in row groups to be streamed.

Legend: n documents, k tokens of all documents together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dualtok.errors import DataError
from dualtok.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    Dtypes = Mapping[str, type[np.generic]]

FORMAT = 3
FORMAT_KEY = b"dualtok.signals"
GROUP_TOKENS = 1 << 20
"""Tokens of a row group; only a longer document has more. Four signals of so many take 16 MiB."""
GROUP_DOCUMENTS = 1 << 16
AGAIN = "remove it and run `dualtok audit` again"


class Ragged(NamedTuple):
    """Values of the tokens of n documents; document i owns ``offsets[i]:offsets[i + 1]`` of each array."""

    document: NDArray[np.int64]
    """Document ids [n]."""
    offsets: NDArray[np.int64]
    """From 0 to k [n + 1]."""
    values: dict[str, NDArray[np.generic]]
    """Name -> one value per token [k]."""


def write_ragged(path: str | Path, ragged: Ragged) -> None:
    """Write one Parquet file that is either whole or absent; its pages have checksums."""
    values = {name: pa.array(array) for name, array in ragged.values.items()}
    schema = _schema({name: array.type for name, array in values.items()})
    schema = schema.with_metadata({FORMAT_KEY: str(FORMAT).encode()})
    with (
        atomic_file(path) as stream,
        pq.ParquetWriter(stream, schema, compression="zstd", use_dictionary=False, write_page_checksum=True) as writer,
    ):
        for first, end in _groups(ragged.offsets):
            start = int(ragged.offsets[first])
            ends = pa.array((ragged.offsets[first : end + 1] - start).astype(np.int32))
            lists = [pa.ListArray.from_arrays(ends, array.slice(start, ends[-1].as_py())) for array in values.values()]
            columns = [pa.array(ragged.document[first:end]), *lists]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=end - first)


def _groups(offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield the first and the end of the documents of each row group."""
    first, n = 0, len(offsets) - 1
    while first < n:
        fitting = int(np.searchsorted(offsets, offsets[first] + GROUP_TOKENS, side="right")) - 1
        end = min(max(fitting, first + 1), first + GROUP_DOCUMENTS, n)
        yield first, end
        first = end


def read_ragged(path: str | Path, dtypes: Dtypes) -> Iterator[Ragged]:
    """Yield the row groups of a file of :func:`write_ragged`; one is in memory at a time.

    Args:
        path: the file.
        dtypes: name -> dtype of the values it must have, no more and no less.

    Raises:
        DataError: the file is missing, torn, altered, of another format, or has other columns.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_schema(path, file.schema_arrow, dtypes)
            for group in range(file.num_row_groups):
                yield _ragged(path, file.read_row_group(group), dtypes)
    except FileNotFoundError:
        raise DataError(f"{path}: no such signals file; run `dualtok audit` again") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable signals file ({error}); {AGAIN}") from error


def _schema(types: Mapping[str, pa.DataType]) -> pa.Schema:
    return pa.schema({"document": pa.int64()} | {name: pa.list_(of) for name, of in types.items()})


def _check_schema(path: str | Path, schema: pa.Schema, dtypes: Dtypes) -> None:
    version = (schema.metadata or {}).get(FORMAT_KEY, b"none").decode(errors="replace")
    if version != str(FORMAT):
        raise DataError(f"{path}: signals format {version}, expected {FORMAT}; {AGAIN}")
    expected = _schema({name: pa.from_numpy_dtype(dtype) for name, dtype in dtypes.items()})
    if [(field.name, field.type) for field in schema] != [(field.name, field.type) for field in expected]:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(f"{path}: columns {found}, expected {', '.join(expected.names)}; {AGAIN}")


def _ragged(path: str | Path, table: pa.Table, dtypes: Dtypes) -> Ragged:
    table = table.combine_chunks()
    lengths = table["document"].to_numpy() * 0
    values: dict[str, NDArray[np.generic]] = {}
    for position, (name, dtype) in enumerate(dtypes.items()):
        lists = table[name].combine_chunks()
        flat = lists.flatten()
        own = lists.value_lengths().to_numpy(zero_copy_only=False)
        if lists.null_count or flat.null_count or (position and not np.array_equal(own, lengths)):
            raise DataError(f"{path}: {name} has gaps, or other lengths than the columns before it; {AGAIN}")
        lengths = own.astype(np.int64)
        values[name] = flat.to_numpy(zero_copy_only=False).astype(dtype)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Ragged(table["document"].to_numpy(), offsets, values)


def joined(groups: list[Ragged], dtypes: Dtypes) -> Ragged:
    """Return several groups of documents as one; none at all give no documents."""
    lengths = np.concatenate([np.zeros(1, np.int64), *(np.diff(group.offsets) for group in groups)])
    values = {
        name: np.concatenate([np.zeros(0, dtype), *(group.values[name] for group in groups)])
        for name, dtype in dtypes.items()
    }
    document = np.concatenate([np.zeros(0, np.int64), *(group.document for group in groups)])
    return Ragged(document, np.cumsum(lengths), values)
