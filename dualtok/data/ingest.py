"""First half of ``dualtok prepare``: read, deduplicate and split documents, staged on disk chunk by chunk.

The position in the source, the counts and the deduplication index are committed to one SQLite database together with
each chunk, so that an interrupted run goes on after the last finished chunk.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from dualtok.data.deduplicate import DuplicateIndex, Sketch, sketch
from dualtok.data.documents import Document, read_documents
from dualtok.data.splits import assign_split, content_digest
from dualtok.errors import DataError
from dualtok.files import atomic_file

if TYPE_CHECKING:
    from dualtok.data.config import DataConfig
    from dualtok.data.parallel import Workers
    from dualtok.monitor.progress import RunProgress

CHUNK_DOCUMENTS = 4096
CHUNK_CHARACTERS = 1 << 25
STAGED = pa.schema(
    [("doc", pa.int64()), ("split", pa.string()), ("sha256", pa.binary(32)), ("text", pa.large_string())]
)


@dataclass
class IngestCounts:
    """What happened to the documents so far."""

    read: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    too_short: int = 0
    unused: int = 0
    chunks: int = 0
    finished: bool = False
    splits: dict[str, int] = field(default_factory=dict)
    read_sha256: str = ""
    """Chained over the texts read, so that a start that goes on can tell whether they are still the same."""


class _Prepared(NamedTuple):
    text: str
    digest: bytes
    sketch: Sketch


class Ingest:
    """Staging of one corpus.

    Args:
        config: the data section.
        folder: staging folder.
    """

    def __init__(self, config: DataConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(folder / "index.sqlite")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._index = DuplicateIndex(self._db, config)
        self._db.execute("CREATE TABLE IF NOT EXISTS progress (id INTEGER PRIMARY KEY, counts TEXT)")
        row = self._db.execute("SELECT counts FROM progress").fetchone()
        self.counts = IngestCounts(**json.loads(row[0])) if row else IngestCounts()

    def run(self, workers: Workers, progress: RunProgress) -> IngestCounts:
        """Read what is left of the source; return the counts of the whole.

        Raises:
            DataError: the source cannot be read, or changed since an interrupted start.
        """
        if not self.counts.finished:
            documents = islice(read_documents(self._config), self._config.max_documents)
            self._skip_what_was_read(documents)
            for texts in _chunks(documents):
                prepared = workers.map(_prepare_text, ((text, self._config) for text in texts), batch=64)
                self._stage(list(prepared))
                progress.advance(len(texts), f"{sum(self.counts.splits.values()):,} kept")
            self.counts.finished = True
            self._commit()
        return self.counts

    def chunk_path(self, number: int) -> Path:
        """Return the file of a staged chunk."""
        return self._folder / f"documents-{number:06d}.arrow"

    def _skip_what_was_read(self, documents: Iterator[Document]) -> None:
        digest = ""
        for document in islice(documents, self.counts.read):
            digest = _chained(digest, content_digest(document.text))
        if digest != self.counts.read_sha256:
            raise DataError(
                f"{self._config.source}: the documents that an interrupted start had read have changed; remove "
                f"{self._config.dir} and prepare from the beginning"
            )

    def check(self) -> None:
        """Refuse a corpus of which nothing is left, for a split or altogether.

        Raises:
            DataError: names the source or the split.
        """
        counts = self.counts
        if sum(counts.splits.values()) + counts.unused == 0:
            raise DataError(
                f"{self._config.source}: empty corpus: {counts.read} documents read, "
                f"{counts.too_short} too short, none left"
            )
        for split, share in self._config.shares.items():
            if not counts.splits.get(split):
                kept = sum(counts.splits.values()) + counts.unused
                raise DataError(
                    f"data.shares.{split}: a share of {share:g} of {kept} documents leaves the split empty; "
                    "raise the share, leave the split out, or give more documents"
                )

    def worth_keeping(self) -> bool:
        """Return whether another start could go on from here: something is staged, and no split will stay empty."""
        if self.counts.finished:
            return all(split in self.counts.splits for split in self._config.shares)
        return self.counts.chunks > 0

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def _stage(self, documents: list[_Prepared]) -> None:
        """Keep, drop and split one chunk's documents, in order; then write and commit it."""
        counts, rows = self.counts, []
        for document in documents:
            doc = counts.read
            counts.read += 1
            counts.read_sha256 = _chained(counts.read_sha256, document.digest)
            if len(document.text) < max(1, self._config.min_characters) or not document.text.strip():
                counts.too_short += 1
                continue
            duplicate = self._index.add(doc, document.sketch)
            if duplicate == "exact":
                counts.exact_duplicates += 1
            elif duplicate == "near":
                counts.near_duplicates += 1
            elif (split := assign_split(document.digest, self._config.shares, self._config.seed)) is None:
                counts.unused += 1
            else:
                counts.splits[split] = counts.splits.get(split, 0) + 1
                rows.append((doc, split, document.digest, document.text))
        columns = [pa.array([row[i] for row in rows], STAGED[i].type) for i in range(len(STAGED))]
        table = pa.Table.from_arrays(columns, schema=STAGED)
        with atomic_file(self.chunk_path(counts.chunks)) as stream, pa.ipc.new_file(stream, STAGED) as writer:
            writer.write_table(table)
        counts.chunks += 1
        self._commit()

    def _commit(self) -> None:
        self._db.execute("INSERT OR REPLACE INTO progress VALUES (0, ?)", (json.dumps(vars(self.counts)),))
        self._db.commit()


def _chained(digest: str, content: bytes) -> str:
    return hashlib.sha256(digest.encode() + content).hexdigest()


def read_staged(path: Path) -> pa.Table:
    """Return a staged chunk."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def _chunks(documents: Iterator[Document]) -> Iterator[list[str]]:
    """Cut the documents into chunks, bounded in number and in characters."""
    texts: list[str] = []
    characters = 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        if len(texts) >= CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def _prepare_text(item: tuple[str, DataConfig]) -> _Prepared:
    """Hash one text; runs in a worker process."""
    text, config = item
    return _Prepared(text, content_digest(text), sketch(text, config))
