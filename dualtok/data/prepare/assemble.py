"""Second half of ``dualtok prepare``: decided documents to packed chunks, and packed chunks to shards."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dualtok.config.data import SPLITS, DataConfig, SplitName
from dualtok.data.manifest import DOCUMENTS, ShardEntry, SplitEntry
from dualtok.data.packing import pack_documents
from dualtok.data.prepare.decide import decisions_path
from dualtok.data.prepare.splits import content_digest
from dualtok.data.prepare.staged import GROUP, Chunk, Staged, StagedAt, read_staged, staged_at
from dualtok.data.shards import blocks_table, describe_shard, schema, shard_name, write_shard
from dualtok.data.tokenizer import encode, load_tokenizer, vocabulary_size
from dualtok.data.tokenizer_check import SpelledOut
from dualtok.errors import DataError
from dualtok.files import atomic_file, file_sha256, write_text
from dualtok.monitor.progress import RunProgress

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from dualtok.data.prepare.canaries import Canary
    from dualtok.data.prepare.parallel import Workers

ENCODED_AT_ONCE = 1 << 20
"""Characters whose token ids are in memory as Python's integers at one time."""
TEXTS_AT_ONCE = 256
"""Documents whose texts are in memory at one time where they are wanted one by one."""
DOCUMENT = pa.schema(
    [
        ("doc", pa.int64()),
        ("sha256", pa.string()),
        ("n_tokens", pa.int64()),
        ("n_characters", pa.int64()),
        ("zlib_bytes", pa.int64()),
    ]
)


TO_PACK = pa.schema([("doc", pa.int64()), ("sha256", pa.binary(32)), ("text", pa.large_string()), (GROUP, pa.string())])


class TokenizerAt(NamedTuple):
    """A tokenizer's folder and its fingerprint, which tells two apart that lay there one after the other."""

    folder: str
    fingerprint: str


class _PackTask(NamedTuple):
    """One chunk to pack."""

    chunk: Chunk
    canaries: list[Canary]
    """Documents of the split ``train`` beside the chunk's own."""


@dataclass(frozen=True)
class _ShardTask:
    """One shard to write."""

    split: SplitName
    lane: int
    number: int
    rows: range
    """The split's blocks in it: ``lane``, ``lane + lanes``, ..."""
    files: list[Path]
    """Packed files that hold them, in order."""
    first_block: int
    """The first file's first block."""


def split_texts(staged: Staged, chunks: list[Chunk], split: str) -> Iterator[str]:
    """Yield the texts of a split's documents in some chunks."""
    for chunk in chunks:
        docs = _documents(staged, chunk, split)
        for first in range(0, len(docs), TEXTS_AT_ONCE):
            yield from staged.take(docs[first : first + TEXTS_AT_ONCE], ["text"])["text"].to_pylist()


def pack_chunks(
    config: DataConfig,
    staged: Staged,
    chunks: list[Chunk],
    tokenizer: TokenizerAt,
    workers: Workers,
    *,
    canaries: dict[int, list[Canary]],
    progress: RunProgress,
) -> None:
    """Tokenise and pack the chunks that are not packed yet, each with the canaries of its number."""
    work = partial(
        _pack_chunk,
        at=staged.at,
        tokenizer_at=tokenizer,
        block_length=config.block_length,
        special=config.special_tokens_in_text == "encode",
        grouped=config.group_field is not None,
    )
    for _ in workers.map(work, [_PackTask(chunk, canaries.get(chunk.number, [])) for chunk in chunks]):
        progress.advance(1)


def count_tokens(
    config: DataConfig, staged: Staged, chunks: list[Chunk], tokenizer: TokenizerAt, workers: Workers, *, progress: bool
) -> NDArray[np.int64]:
    """Return how often each token id occurs in the documents of all splits, [vocabulary]."""
    vocabulary = vocabulary_size(_tokenizer_of_process(tokenizer)[0])
    work = partial(
        _count_chunk,
        at=staged.at,
        tokenizer_at=tokenizer,
        special=config.special_tokens_in_text == "encode",
        vocabulary=vocabulary,
    )
    total = np.zeros(vocabulary, dtype=np.int64)
    with RunProgress("prepare: tokens counted", len(chunks), active=progress) as bar:
        for counts in workers.map(work, chunks):
            total += counts
            bar.advance(1)
    return total


def spelled_out(staging: Path, chunks: list[Chunk]) -> int:
    """Return how many packed documents spell out a special token."""
    return sum(int(_done_path(staging, chunk).read_text(encoding="utf-8") or 0) for chunk in chunks)


def write_splits(
    config: DataConfig, folder: Path, staging: Path, chunks: list[Chunk], workers: Workers, *, progress: bool
) -> dict[str, SplitEntry]:
    """Deal each split's blocks to its lanes (block j to lane j mod L) and write the shards that are not there yet.

    Raises:
        DataError: the shards hold other tokens than the documents.
    """
    tasks: list[_ShardTask] = []
    entries: dict[SplitName, list[ShardEntry]] = {split: [] for split in SPLITS if split in config.shares}
    for split in entries:
        packed = [p for chunk in chunks if (p := _packed_path(staging, chunk, split, "blocks")).is_file()]
        tasks += _shard_tasks(split, packed, config.lanes, config.rows_per_shard)
    work = partial(_write_lane_shard, folder=folder, block_length=config.block_length)
    with RunProgress("prepare: shards", len(tasks), active=progress, plain_every=max(1, len(tasks) // 4)) as bar:
        for task, entry in zip(tasks, workers.map(work, tasks), strict=True):
            entries[task.split].append(entry)
            bar.advance(1)
    return {
        split: _split_entry(
            folder / split,
            [_packed_path(staging, chunk, split, "table") for chunk in chunks],
            shards,
            document_schema(grouped=config.group_field is not None),
        )
        for split, shards in entries.items()
    }


def _documents(staged: Staged, chunk: Chunk, split: str) -> NDArray[np.int64]:
    decisions = np.load(decisions_path(staged.at.folder, chunk))
    return chunk.first + np.flatnonzero(decisions == SPLITS.index(split))


@lru_cache(maxsize=1)
def _tokenizer_of_process(at: TokenizerAt) -> tuple[PreTrainedTokenizerBase, SpelledOut]:
    """Return the tokenizer, loaded once per process: each load keeps some megabytes of memory for good."""
    tokenizer = load_tokenizer(at.folder)
    return tokenizer, SpelledOut(tokenizer)


def document_schema(*, grouped: bool) -> pa.Schema:
    """Return the columns of a split's table of documents, with ``group`` or without."""
    return DOCUMENT.append(pa.field(GROUP, pa.string())) if grouped else DOCUMENT


def _pack_chunk(
    task: _PackTask, *, at: StagedAt, tokenizer_at: TokenizerAt, block_length: int, special: bool, grouped: bool
) -> None:
    """Tokenise and pack one chunk, split by split; runs in a worker process."""
    chunk = task.chunk
    done = _done_path(at.folder, chunk)
    if done.is_file():
        return
    staged, (tokenizer, spelled) = staged_at(at), _tokenizer_of_process(tokenizer_at)
    with_special = 0
    for split in SPLITS:
        table = _split_of(staged, chunk, split, grouped=grouped)
        if split == "train" and task.canaries:
            table = pa.concat_tables([table, _as_documents(task.canaries)])
        if not table.num_rows:
            continue
        docs, texts = table["doc"].to_pylist(), table["text"].to_pylist()
        ids = _encoded(tokenizer, texts, special=special)
        with_special += spelled.count(texts)
        blocks = pack_documents(list(zip(docs, ids, strict=True)), block_length)
        documents = pa.Table.from_arrays(
            [
                pa.array(docs, pa.int64()),
                pa.array([digest.hex() for digest in table["sha256"].to_pylist()]),
                pa.array([len(row) for row in ids], pa.int64()),
                pa.array([len(text) for text in texts], pa.int64()),
                pa.array([len(zlib.compress(text.encode("utf-8"))) for text in texts], pa.int64()),
                *([table[GROUP].combine_chunks()] if grouped else []),
            ],
            schema=document_schema(grouped=grouped),
        )
        _write_table(_packed_path(at.folder, chunk, split, "blocks"), blocks_table(blocks, block_length))
        _write_table(_packed_path(at.folder, chunk, split, "table"), documents)
    write_text(done, str(with_special))


def _count_chunk(
    chunk: Chunk, *, at: StagedAt, tokenizer_at: TokenizerAt, special: bool, vocabulary: int
) -> NDArray[np.int64]:
    """Count the token ids of one chunk's documents; runs in a worker process."""
    staged, (tokenizer, _) = staged_at(at), _tokenizer_of_process(tokenizer_at)
    counts = np.zeros(vocabulary, dtype=np.int64)
    for split in SPLITS:
        for ids in _encoded(
            tokenizer, _split_of(staged, chunk, split, grouped=False)["text"].to_pylist(), special=special
        ):
            counts += np.bincount(ids, minlength=vocabulary)
    return counts


def _split_of(staged: Staged, chunk: Chunk, split: str, *, grouped: bool) -> pa.Table:
    """Return number, digest, text and group of a split's documents in a chunk."""
    docs = _documents(staged, chunk, split)
    if not len(docs):
        return TO_PACK.empty_table()
    found = staged.take(docs, ["sha256", "text", *([GROUP] if grouped else [])])
    if not grouped:
        found = found.append_column(TO_PACK.field(GROUP), pa.nulls(len(docs), pa.string()))
    return found.add_column(0, TO_PACK.field("doc"), pa.array(docs)).cast(TO_PACK)


def _as_documents(canaries: list[Canary]) -> pa.Table:
    docs, texts = [canary.doc for canary in canaries], [canary.text for canary in canaries]
    digests, nobodys = [content_digest(text) for text in texts], [None] * len(texts)
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip((docs, digests, texts, nobodys), TO_PACK, strict=True)],
        schema=TO_PACK,
    )


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[NDArray[np.int32]]:
    ids: list[NDArray[np.int32]] = []
    first = characters = 0
    for position, text in enumerate(texts):
        characters += len(text)
        if characters >= ENCODED_AT_ONCE or position == len(texts) - 1:
            some = encode(tokenizer, texts[first : position + 1], special=special)
            ids += [np.array(row, dtype=np.int32) for row in some]
            first, characters = position + 1, 0
    return ids


def _done_path(staging: Path, chunk: Chunk) -> Path:
    return staging / f"packed-{chunk.number:06d}.done"


def _packed_path(staging: Path, chunk: Chunk, split: str, kind: str) -> Path:
    return staging / f"packed-{chunk.number:06d}-{split}-{kind}.arrow"


def _write_table(path: Path, table: pa.Table) -> None:
    with atomic_file(path) as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)


def _shard_tasks(split: SplitName, packed: list[Path], lanes: int, rows_per_shard: int) -> list[_ShardTask]:
    """Return a split's shards, each with the packed files that its rows lie in."""
    ends = np.cumsum([read_staged(path).num_rows for path in packed])
    blocks = int(ends[-1])
    tasks = []
    for lane in range(min(lanes, blocks)):
        lane_rows = range(lane, blocks, lanes)
        for number, first in enumerate(range(0, len(lane_rows), rows_per_shard)):
            rows = lane_rows[first : first + rows_per_shard]
            low, high = np.searchsorted(ends, [rows[0], rows[-1]], side="right")
            start = int(ends[low - 1]) if low else 0
            tasks.append(_ShardTask(split, lane, number, rows, packed[low : high + 1], start))
    return tasks


def _write_lane_shard(task: _ShardTask, *, folder: Path, block_length: int) -> ShardEntry:
    """Write one shard unless it is there; runs in a worker process."""
    target = folder / task.split
    path = target / shard_name(task.lane, task.number)
    if path.is_file():
        return describe_shard(path, task.lane, read_staged(path))
    wanted = np.array(task.rows)
    parts, first = [], task.first_block
    for file in task.files:
        table = read_staged(file)
        inside = wanted[(wanted >= first) & (wanted < first + table.num_rows)] - first
        if len(inside):
            parts.append(table.take(pa.array(inside)))
        first += table.num_rows
    return write_shard(target, task.lane, task.number, pa.concat_tables(parts).cast(schema(block_length)))


def _split_entry(folder: Path, tables: list[Path], shards: list[ShardEntry], columns: pa.Schema) -> SplitEntry:
    """Write a split's table of documents, chunk by chunk, and return its manifest entry."""
    documents = tokens = 0
    path = folder / DOCUMENTS
    with atomic_file(path) as stream, pa.ipc.new_file(stream, columns) as writer:
        for part in tables:
            if part.is_file():
                table = read_staged(part)
                writer.write_table(table)
                documents += table.num_rows
                tokens += pc.sum(table["n_tokens"]).as_py()
    blocks = sum(shard.rows for shard in shards)
    pieces = sum(_pieces(folder / shard.file) for shard in shards)
    if sum(shard.tokens for shard in shards) != tokens:
        raise DataError(f"{folder}: shards hold other tokens than its documents; remove the folder and prepare again")
    return SplitEntry(
        documents=documents,
        tokens=tokens,
        predicted_tokens=tokens - pieces,
        blocks=blocks,
        shards=shards,
        documents_sha256=file_sha256(path),
        largest_id=max((_largest_id(folder / shard.file) for shard in shards), default=0),
    )


def _largest_id(shard: Path) -> int:
    return int(pc.max(read_staged(shard)["input_ids"].combine_chunks().flatten()).as_py())


def _pieces(shard: Path) -> int:
    return int(pc.sum(pc.list_value_length(read_staged(shard)["segments"])).as_py())
