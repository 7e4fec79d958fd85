"""Which documents share a key and so must be compared: found by sorting on disk, so that the cost per document stays
the same however many there are.

An index that is asked and extended document by document touches a random page per key, which is slow once it outgrows
the memory. Sorting reads and writes in long runs instead: the keys of :data:`RUN_DOCUMENTS` documents at a time are
sorted into one file, then one range of keys after the other is gathered from all files. Both steps are independent
tasks for worker processes, and a finished file is never written again.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dualtok.data.prepare.deduplicate import key_count, keys
from dualtok.data.prepare.staged import Staged, StagedAt, fixed_width, staged_at
from dualtok.files import atomic_file

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from dualtok.config.data import DataConfig
    from dualtok.data.prepare.parallel import Workers
    from dualtok.monitor.progress import RunProgress

RUN_DOCUMENTS = 1 << 16
RANGE_RECORDS = 1 << 20
DOCUMENTS_AT_ONCE = 1 << 13


class _Run(NamedTuple):
    path: Path
    first: int
    """First document."""
    end: int
    """One past its last."""


class _Range(NamedTuple):
    path: Path
    first: int
    """Least key."""
    last: int
    """Greatest key."""


class Membership(NamedTuple):
    """A document's place in a group of documents with the same key."""

    key: int
    last: int
    """The group's last document."""


def is_short(table: pa.Table, config: DataConfig) -> NDArray[np.bool_]:
    """Return which documents are left out for their length; they take no part in the search for duplicates."""
    length = table["n_characters"].to_numpy()
    return np.asarray(table["blank"].to_numpy() | (length < max(1, config.min_characters)))


def find_groups(config: DataConfig, staged: Staged, workers: Workers, progress: RunProgress) -> Groups:
    """Sort the keys of all documents and return the groups of two or more."""
    if not staged.documents:
        return Groups([])
    runs = _runs(staged.at.folder, staged.documents)
    ranges = _ranges(staged.at.folder, staged.documents * key_count(config))
    for _ in workers.map(partial(_write_run, at=staged.at, config=config), runs):
        progress.advance(1)
    for _ in workers.map(partial(_write_groups, runs=[run.path for run in runs]), ranges):
        progress.advance(1)
    return Groups([one.path for one in ranges])


def steps(config: DataConfig, documents: int) -> int:
    """Return how many steps :func:`find_groups` reports for so many documents."""
    return len(_runs(Path(), documents)) + len(_ranges(Path(), documents * key_count(config)))


class Groups:
    """Memberships by document, read for :data:`RUN_DOCUMENTS` documents at a time."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._first = self._end = 0
        self._window = np.empty((3, 0), dtype=np.uint64)

    def of(self, first: int, end: int) -> dict[int, list[Membership]]:
        """Return the memberships of documents ``first`` to ``end - 1``; those in no group are absent."""
        if first < self._first or end > self._end:
            self._first, self._end = first, max(end, first + RUN_DOCUMENTS)
            self._window = self._read(self._first, self._end)
        low, high = np.searchsorted(self._window[0], np.array([first, end], dtype=np.uint64))
        found: dict[int, list[Membership]] = {}
        for doc, key, last in self._window[:, low:high].T.tolist():
            found.setdefault(doc, []).append(Membership(key, last))
        return found

    def _read(self, first: int, end: int) -> NDArray[np.uint64]:
        parts = [part for file in self._files if (part := _slice(file, first, end)).shape[1]]
        if not parts:
            return np.empty((3, 0), dtype=np.uint64)
        window = np.concatenate(parts, axis=1)
        return window[:, np.argsort(window[0], kind="stable")]


def _runs(folder: Path, documents: int) -> list[_Run]:
    firsts = range(0, documents, RUN_DOCUMENTS)
    return [
        _Run(folder / f"keys-{number:06d}.npy", first, min(first + RUN_DOCUMENTS, documents))
        for number, first in enumerate(firsts)
    ]


def _ranges(folder: Path, records: int) -> list[_Range]:
    """Cut the space of keys, which are uniform, into ranges of about :data:`RANGE_RECORDS` records."""
    count = max(1, -(-records // RANGE_RECORDS))
    ends = [(number << 64) // count for number in range(count + 1)]
    return [_Range(folder / f"groups-{number:06d}.npy", ends[number], ends[number + 1] - 1) for number in range(count)]


def _write_run(run: _Run, *, at: StagedAt, config: DataConfig) -> None:
    """Write the sorted (key, document) of a run of documents; runs in a worker process."""
    if run.path.is_file():
        return
    staged = staged_at(at)
    parts = [
        _records(staged, low, min(low + DOCUMENTS_AT_ONCE, run.end), config)
        for low in range(run.first, run.end, DOCUMENTS_AT_ONCE)
    ]
    records = np.concatenate(parts, axis=1)
    _save(run.path, records[:, np.argsort(records[0], kind="stable")])


def _records(staged: Staged, first: int, end: int, config: DataConfig) -> NDArray[np.uint64]:
    columns = ["exact", "n_characters", "blank"]
    if config.near_duplicate_threshold is not None:
        columns.append("signature")
    docs = np.arange(first, end)
    table = staged.take(docs, columns)
    kept = ~is_short(table, config)
    signatures = fixed_width(table, "signature", np.uint32)[kept] if "signature" in columns else None
    found = keys(fixed_width(table, "exact", np.uint8)[kept], signatures, config)
    return np.stack([found.ravel(), np.repeat(docs[kept].astype(np.uint64), found.shape[1])])


def _write_groups(one: _Range, *, runs: list[Path]) -> None:
    """Write the memberships of one range of keys by document; runs in a worker process."""
    if one.path.is_file():
        return
    records = np.concatenate([_slice(run, one.first, one.last + 1) for run in runs], axis=1)
    order = np.argsort(records[0], kind="stable")  # the runs hold ascending documents, so those of a key ascend
    found, docs = records[0, order], records[1, order]
    starts = np.flatnonzero(np.concatenate([[True], found[1:] != found[:-1]])) if len(found) else np.empty(0, np.int64)
    sizes = np.diff(np.append(starts, len(found)))
    lasts = np.repeat(docs[starts + sizes - 1], sizes) if len(found) else docs
    shared = np.repeat(sizes > 1, sizes)
    members = np.stack([docs[shared], found[shared], lasts[shared]])
    _save(one.path, members[:, np.argsort(members[0], kind="stable")])


def _slice(path: Path, first: int, end: int) -> NDArray[np.uint64]:
    """Return a copy of the columns whose first value is in [first, end), of a file sorted by it."""
    stored = np.load(path, mmap_mode="r")
    low = np.searchsorted(stored[0], np.uint64(first))
    high = np.searchsorted(stored[0], np.uint64(end)) if end < 1 << 64 else stored.shape[1]
    return np.array(stored[:, low:high])


def _save(path: Path, values: NDArray[np.uint64]) -> None:
    with atomic_file(path) as stream:
        np.save(stream, np.ascontiguousarray(values))
