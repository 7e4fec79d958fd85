"""First stage of ``dualtok prepare``: read one part of the source, hash and sketch each document, and stage it.

Staged files are written whole, each with a chained digest of all texts so far, so that the files themselves are the
position: an interrupted part goes on after the last of them.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from dualtok.data.chat.conversations import plain_text
from dualtok.data.prepare.deduplicate import EXACT_BYTES, sketch
from dualtok.data.prepare.parts import COMPLETE, PartReader
from dualtok.data.prepare.splits import content_digest
from dualtok.data.prepare.staged import CHAT, GROUP, is_full, read_staged
from dualtok.errors import DataError
from dualtok.files import atomic_file, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dualtok.config.data import DataConfig
    from dualtok.data.prepare.parallel import Workers
    from dualtok.data.sources.documents import Document
    from dualtok.monitor.progress import RunProgress

CHAIN = b"read_sha256"


class _Prepared(NamedTuple):
    digest: bytes
    exact: bytes
    signature: bytes | None
    blank: bool
    of_characters: bool
    n_characters: int


def staged_files(folder: Path) -> list[Path]:
    """Return a part's finished files, in order."""
    return sorted(folder.glob("documents-*.arrow"))


def stage_part(
    config: DataConfig, reader: PartReader, folder: Path, workers: Workers, *, progress: RunProgress
) -> None:
    """Stage what is left of a part.

    Raises:
        DataError: the source cannot be read, or changed since an interrupted start.
    """
    schema = staged_schema(config)
    rows = [read_staged(path).num_rows for path in staged_files(folder)]
    documents = iter(reader)
    chain = _pass_over(documents, sum(rows), folder, config)
    work = partial(_prepare_text, config=config)
    for some in _chunks(documents):
        texts, groups = [document.text for document in some], [document.group for document in some]
        origins = [document.origin if document.is_chat else None for document in some]
        prepared = list(workers.map(work, zip(texts, [document.is_chat for document in some], strict=True), batch=64))
        for document, group in zip(prepared, groups, strict=True):
            chain = _chained(chain, document.digest, group)
        columns = [
            pa.array([document.digest for document in prepared], schema.field("sha256").type),
            pa.array([document.exact for document in prepared], schema.field("exact").type),
            pa.array([document.signature for document in prepared], schema.field("signature").type),
            pa.array([document.n_characters for document in prepared], pa.int64()),
            pa.array([document.blank for document in prepared], pa.bool_()),
            pa.array([document.of_characters for document in prepared], pa.bool_()),
            pa.array(texts, pa.large_string()),
            *([] if config.group_field is None else [pa.array(groups, pa.string())]),
            *([] if config.rows == "text" else [pa.array(origins, pa.string())]),
        ]
        path = folder / f"documents-{len(rows):06d}.arrow"
        table = pa.Table.from_arrays(columns, schema=schema.with_metadata({CHAIN: chain.encode()}))
        with atomic_file(path) as stream, pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table)
        rows.append(len(texts))
        progress.advance(len(texts))
    write_text(folder / COMPLETE, json.dumps({"rows": rows, "units": reader.counts, "unit_count": reader.unit_count}))


def staged_schema(config: DataConfig) -> pa.Schema:
    """Return the columns of a staged file; the number of a document follows from its place (:mod:`.staged`)."""
    signature = pa.null() if config.near_duplicate_threshold is None else pa.binary(4 * config.permutations)
    return pa.schema(
        [
            ("sha256", pa.binary(32)),
            ("exact", pa.binary(EXACT_BYTES)),
            ("signature", signature),
            ("n_characters", pa.int64()),
            ("blank", pa.bool_()),
            ("of_characters", pa.bool_()),
            ("text", pa.large_string()),
            *([] if config.group_field is None else [(GROUP, pa.string())]),
            *([] if config.rows == "text" else [(CHAT, pa.string())]),
        ]
    )


def _pass_over(documents: Iterator[Document], count: int, folder: Path, config: DataConfig) -> str:
    """Read again what is staged, and return the chained digest of it; refuse other texts than then."""
    chain = ""
    for document in islice(documents, count):
        chain = _chained(chain, content_digest(document.text), document.group)
    if count:
        known = read_staged(staged_files(folder)[-1]).schema.metadata[CHAIN].decode()
        if chain != known:
            raise DataError(
                f"{config.source}: the documents that an interrupted start had read have changed; remove {folder} "
                "and prepare from the beginning"
            )
    return chain


def _chained(digest: str, content: bytes, group: str | None) -> str:
    return hashlib.sha256(digest.encode() + content + (b"" if group is None else group.encode())).hexdigest()


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Cut the documents into chunks, bounded in number and in characters."""
    some: list[Document] = []
    characters = 0
    for document in documents:
        some.append(document)
        characters += len(document.text)
        if is_full(len(some), characters):
            yield some
            some, characters = [], 0
    if some:
        yield some


def _prepare_text(document: tuple[str, bool], *, config: DataConfig) -> _Prepared:
    """Hash one text, or conversation if so; runs in a worker process."""
    text, is_chat = document
    said = plain_text(text) if is_chat else text
    exact, signature, of_characters = sketch(said, config)
    stored = None if signature is None else signature.tobytes()
    return _Prepared(content_digest(text), exact, stored, not said.strip(), of_characters, len(said))
