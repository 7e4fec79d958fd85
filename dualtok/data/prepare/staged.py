"""The staged documents of all parts as one sequence, in the order in which the source holds them.

A document's number is its place in the source, whatever the number of parts, so all that follows is the same for any.
"""

from __future__ import annotations

import json
import secrets
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from dualtok.data.prepare.parts import COMPLETE, Part
from dualtok.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

Number = TypeVar("Number", bound=np.generic)
GROUP = "group"
"""Column, of staged files and of a split's table of documents, that says whose each document is; there with
``data.group_field`` alone."""
CHAT = "chat_origin"
"""Column of staged files that says of a conversation where it comes from, and is null for a text; not there with
``data.rows: text``."""
CHUNK_DOCUMENTS = 4096
CHUNK_CHARACTERS = 1 << 25


class Chunk(NamedTuple):
    """Documents ``first`` to ``end - 1``: what one process tokenizes and packs at a time."""

    number: int
    first: int
    end: int


class StagedAt(NamedTuple):
    """Where staged documents lie, small enough for a message to a worker."""

    folder: Path
    of: int
    token: str
    """Tells apart what lay in the same folder one after the other, for a process may keep what it read."""


def is_full(documents: int, characters: int) -> bool:
    """Return whether a chunk of so many documents and characters is to end."""
    return documents >= CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS


def read_staged(path: Path) -> pa.Table:
    """Return an Arrow file's table, memory-mapped."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


class Staged:
    """Documents by number.

    Args:
        folder: the staging folder, with all its parts complete.
        of: number of parts.

    Raises:
        DataError: the parts don't fit each other.
    """

    def __init__(self, folder: Path, of: int) -> None:
        self.at = StagedAt(folder, of, secrets.token_hex(8))
        notes = [
            json.loads((Part(number, of).folder(folder) / COMPLETE).read_text(encoding="utf-8"))
            for number in range(1, of + 1)
        ]
        self._ends = [np.cumsum(note["rows"], dtype=np.int64) for note in notes]
        rows = [sum(note["rows"]) for note in notes]
        self.documents = sum(rows)
        self._unit_ends: NDArray[np.int64] | None = None
        if notes[0]["units"] is not None:
            counts = [notes[unit % of]["units"][str(unit)] for unit in range(notes[0]["unit_count"])]
            self._unit_ends = np.cumsum(counts, dtype=np.int64)
            self._unit_rows = np.zeros(len(counts), dtype=np.int64)  # a part's rows before each unit
            for first in range(of):
                self._unit_rows[first::of][1:] = np.cumsum(counts[first::of])[:-1]
        elif rows != [len(range(number, self.documents, of)) for number in range(of)]:
            raise DataError(
                f"{folder}: the parts hold {rows} documents, which no source divided by documents gives: it changed "
                "between them; remove the folder and begin again"
            )

    def take(self, docs: NDArray[np.int64], columns: list[str]) -> pa.Table:
        """Return some columns of some documents, in the order of their numbers ``docs``, ascending."""
        part, row = self._locate(docs)
        file = np.empty_like(row)
        for number in np.unique(part):
            mine = part == number
            file[mine] = np.searchsorted(self._ends[number], row[mine], side="right")
        order = np.lexsort((row, file, part))
        breaks = np.flatnonzero(np.diff(part[order]) | np.diff(file[order])) + 1
        tables = [
            self._rows(int(part[some[0]]), int(file[some[0]]), row[some], columns)
            for some in np.split(order, breaks)
            if len(some)
        ]
        table = pa.concat_tables(tables)
        if np.array_equal(order, np.arange(len(order))):
            return table
        return table.take(pa.array(np.argsort(order)))

    def _locate(self, docs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the part (from 0) and the row in it of each document."""
        of = self.at.of
        if self._unit_ends is None:
            return docs % of, docs // of
        unit = np.searchsorted(self._unit_ends, docs, side="right")
        starts = np.concatenate([[0], self._unit_ends])
        return unit % of, self._unit_rows[unit] + docs - starts[unit]

    def _rows(self, part: int, file: int, rows: NDArray[np.int64], columns: list[str]) -> pa.Table:
        before = int(self._ends[part][file - 1]) if file else 0
        folder = Part(part + 1, self.at.of).folder(self.at.folder)
        table = read_staged(folder / f"documents-{file:06d}.arrow").select(columns).replace_schema_metadata(None)
        first = int(rows[0])
        if int(rows[-1]) - first + 1 == len(rows):
            return table.slice(first - before, len(rows))
        return table.take(pa.array(rows - before))


@lru_cache(maxsize=1)
def staged_at(at: StagedAt) -> Staged:
    """Return staged documents in a worker process, which keeps the last ones it was asked for."""
    return Staged(at.folder, at.of)


def fixed_width(table: pa.Table, column: str, dtype: type[Number]) -> NDArray[Number]:
    """Return a column of fixed-size binary values as an array [rows, values]."""
    values = table.column(column).combine_chunks()
    width = values.type.byte_width
    raw = np.frombuffer(values.buffers()[1], dtype=np.uint8)
    raw = raw[values.offset * width : (values.offset + len(values)) * width]
    return raw.view(dtype).reshape(len(values), -1)
