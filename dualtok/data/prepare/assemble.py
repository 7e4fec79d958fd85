"""Second half of ``dualtok prepare``: decided documents to packed chunks, and packed chunks to shards."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dualtok.config.data import SPLITS, DataConfig, SplitName
from dualtok.data.chat.conversations import plain_text
from dualtok.data.chat.encoding import DocumentEncoder, learned
from dualtok.data.manifest import DOCUMENTS, ShardEntry, SplitEntry
from dualtok.data.packing import pack_documents
from dualtok.data.prepare.decide import decisions_path
from dualtok.data.prepare.splits import content_digest
from dualtok.data.prepare.staged import CHAT, GROUP, Chunk, Staged, StagedAt, read_staged, staged_at
from dualtok.data.shards import blocks_table, describe_shard, schema, shard_name, write_shard
from dualtok.data.tokenizer import load_tokenizer, vocabulary_size
from dualtok.data.tokenizer_check import SpelledOut
from dualtok.errors import DataError
from dualtok.files import atomic_file, file_sha256, write_text
from dualtok.monitor.progress import RunProgress

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from dualtok.data.chat.encoding import Encoded
    from dualtok.data.prepare.canaries import Canary
    from dualtok.data.prepare.parallel import Workers

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


TO_PACK = pa.schema(
    [
        ("doc", pa.int64()),
        ("sha256", pa.binary(32)),
        ("text", pa.large_string()),
        (GROUP, pa.string()),
        (CHAT, pa.string()),
    ]
)
N_TRAINED = ("n_trained", pa.int64())
"""Column of a split's table of documents, of folders with a mask alone: the tokens of each that have a loss."""


class TokenizerAt(NamedTuple):
    """A tokenizer's folder and its fingerprint, which tells two apart that lay there one after the other."""

    folder: str
    fingerprint: str


class HowToPack(NamedTuple):
    """What packing depends on beside the documents."""

    at: StagedAt
    tokenizer: TokenizerAt
    block_length: int
    special: bool
    """Whether special tokens that a text spells out become these tokens."""
    train_on: str
    grouped: bool
    """Whether the documents have groups."""
    chats: bool
    """Whether conversations may be among them."""
    masked: bool
    """Whether blocks say which tokens are trained."""

    @classmethod
    def of(cls, config: DataConfig, staged: Staged, tokenizer: TokenizerAt, *, masked: bool) -> HowToPack:
        """Return what the ``data`` section says."""
        special, grouped = config.special_tokens_in_text == "encode", config.group_field is not None
        train_on, chats = config.train_on or "assistant", config.rows != "text"
        return cls(staged.at, tokenizer, config.block_length, special, train_on, grouped, chats, masked)


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


def split_texts(staged: Staged, chunks: list[Chunk], split: str, *, chats: bool) -> Iterator[str]:
    """Yield the texts of a split's documents; of conversations, if there may be ``chats``, what is said in them."""
    for chunk in chunks:
        docs = _documents(staged, chunk, split)
        for first in range(0, len(docs), TEXTS_AT_ONCE):
            table = staged.take(docs[first : first + TEXTS_AT_ONCE], ["text", *([CHAT] if chats else [])])
            if not chats:
                yield from table["text"].to_pylist()
                continue
            for text, origin in zip(table["text"].to_pylist(), table[CHAT].to_pylist(), strict=True):
                yield text if origin is None else plain_text(text)


def pack_chunks(
    how: HowToPack, chunks: list[Chunk], workers: Workers, *, canaries: dict[int, list[Canary]], progress: RunProgress
) -> None:
    """Tokenise and pack the chunks that are not packed yet, each with the canaries of its number."""
    work = partial(_pack_chunk, how=how)
    for _ in workers.map(work, [_PackTask(chunk, canaries.get(chunk.number, [])) for chunk in chunks]):
        progress.advance(1)


def count_tokens(how: HowToPack, chunks: list[Chunk], workers: Workers, *, progress: bool) -> NDArray[np.int64]:
    """Return how often each token id occurs in the documents of all splits, [vocabulary]."""
    vocabulary = vocabulary_size(_tokenizer_of_process(how.tokenizer)[0])
    work = partial(_count_chunk, how=how, vocabulary=vocabulary)
    total = np.zeros(vocabulary, dtype=np.int64)
    with RunProgress("prepare: tokens counted", len(chunks), active=progress) as bar:
        for counts in workers.map(work, chunks):
            total += counts
            bar.advance(1)
    return total


def spelled_out(staging: Path, chunks: list[Chunk]) -> int:
    """Return how many packed documents spell out a special token."""
    return sum(_noted(staging, chunk)[0] for chunk in chunks)


def longer_than_a_block(staging: Path, chunks: list[Chunk]) -> int:
    """Return how many packed conversations are longer than a block."""
    return sum(_noted(staging, chunk)[1] for chunk in chunks)


def _noted(staging: Path, chunk: Chunk) -> tuple[int, int]:
    spelled, longer, *_ = [*map(int, _done_path(staging, chunk).read_text(encoding="utf-8").split()), 0, 0]
    return spelled, longer


def write_splits(
    config: DataConfig,
    folder: Path,
    staging: Path,
    chunks: list[Chunk],
    workers: Workers,
    *,
    masked: bool,
    progress: bool,
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
    work = partial(_write_lane_shard, folder=folder, columns=schema(config.block_length, masked=masked))
    with RunProgress("prepare: shards", len(tasks), active=progress, plain_every=max(1, len(tasks) // 4)) as bar:
        for task, entry in zip(tasks, workers.map(work, tasks), strict=True):
            entries[task.split].append(entry)
            bar.advance(1)
    return {
        split: _split_entry(
            folder / split,
            [_packed_path(staging, chunk, split, "table") for chunk in chunks],
            shards,
            document_schema(grouped=config.group_field is not None, masked=masked),
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


def document_schema(*, grouped: bool, masked: bool = False) -> pa.Schema:
    """Return the columns of a split's table of documents, with ``group`` and ``n_trained`` or without."""
    columns = DOCUMENT.append(pa.field(GROUP, pa.string())) if grouped else DOCUMENT
    return columns.append(pa.field(*N_TRAINED)) if masked else columns


def _pack_chunk(task: _PackTask, *, how: HowToPack) -> None:
    """Tokenise and pack one chunk, split by split; runs in a worker process."""
    chunk, folder = task.chunk, how.at.folder
    done = _done_path(folder, chunk)
    if done.is_file():
        return
    staged, (tokenizer, spelled) = staged_at(how.at), _tokenizer_of_process(how.tokenizer)
    encoder = DocumentEncoder(tokenizer, train_on=how.train_on, special=how.special)
    with_special = longer = 0
    for split in SPLITS:
        table = _split_of(staged, chunk, split, how)
        if split == "train" and task.canaries:
            table = pa.concat_tables([table, _as_documents(task.canaries)])
        if not table.num_rows:
            continue
        docs, texts, origins = (table[name].to_pylist() for name in ("doc", "text", CHAT))
        encoded = encoder.encode(texts, origins)
        with_special += spelled.count(texts)
        longer += sum(
            origin is not None and len(own.ids) > how.block_length for origin, own in zip(origins, encoded, strict=True)
        )
        trained = {doc: own.trained for doc, own in zip(docs, encoded, strict=True)} if how.masked else None
        ids = [(doc, own.ids) for doc, own in zip(docs, encoded, strict=True)]
        blocks = pack_documents(ids, how.block_length, trained)
        _write_table(_packed_path(folder, chunk, split, "blocks"), blocks_table(blocks, how.block_length))
        _write_table(_packed_path(folder, chunk, split, "table"), _document_table(table, encoded, how))
    write_text(done, f"{with_special} {longer}")


def _document_table(table: pa.Table, encoded: list[Encoded], how: HowToPack) -> pa.Table:
    """Return the rows of a split's table of documents.

    Raises:
        DataError: nothing of a conversation would be learned.
    """
    n_trained = [int(learned(own.trained, how.block_length).sum()) for own in encoded] if how.masked else []
    for count, origin in zip(n_trained, table[CHAT].to_pylist() if how.masked else [], strict=True):
        if origin is not None and not count:
            raise DataError(
                f"{origin}: no token of this conversation would be trained: its only ones are the first of a block; "
                "leave the row out, or change data.block_length"
            )
    return pa.Table.from_arrays(
        [
            table["doc"].combine_chunks(),
            pa.array([digest.hex() for digest in table["sha256"].to_pylist()]),
            pa.array([len(own.ids) for own in encoded], pa.int64()),
            pa.array([own.n_characters for own in encoded], pa.int64()),
            pa.array([own.zlib_bytes for own in encoded], pa.int64()),
            *([table[GROUP].combine_chunks()] if how.grouped else []),
            *([pa.array(n_trained, pa.int64())] if how.masked else []),
        ],
        schema=document_schema(grouped=how.grouped, masked=how.masked),
    )


def _count_chunk(chunk: Chunk, *, how: HowToPack, vocabulary: int) -> NDArray[np.int64]:
    """Count the token ids of one chunk's documents; runs in a worker process."""
    staged, (tokenizer, _) = staged_at(how.at), _tokenizer_of_process(how.tokenizer)
    encoder = DocumentEncoder(tokenizer, train_on=how.train_on, special=how.special)
    counts = np.zeros(vocabulary, dtype=np.int64)
    for split in SPLITS:
        table = _split_of(staged, chunk, split, how)
        for encoded in encoder.encode(table["text"].to_pylist(), table[CHAT].to_pylist()):
            counts += np.bincount(encoded.ids, minlength=vocabulary)
    return counts


def _split_of(staged: Staged, chunk: Chunk, split: str, how: HowToPack) -> pa.Table:
    """Return number, digest, text, group and conversation's origin of a split's documents in a chunk."""
    docs = _documents(staged, chunk, split)
    if not len(docs):
        return TO_PACK.empty_table()
    found = staged.take(docs, ["sha256", "text", *([GROUP] if how.grouped else []), *([CHAT] if how.chats else [])])
    for name, there in ((GROUP, how.grouped), (CHAT, how.chats)):
        if not there:
            found = found.append_column(TO_PACK.field(name), pa.nulls(len(docs), pa.string()))
    return found.add_column(0, TO_PACK.field("doc"), pa.array(docs)).select(TO_PACK.names).cast(TO_PACK)


def _as_documents(canaries: list[Canary]) -> pa.Table:
    docs, texts = [canary.doc for canary in canaries], [canary.text for canary in canaries]
    digests, none = [content_digest(text) for text in texts], [None] * len(texts)
    columns = (docs, digests, texts, none, none)
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, TO_PACK, strict=True)], schema=TO_PACK
    )


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


def _write_lane_shard(task: _ShardTask, *, folder: Path, columns: pa.Schema) -> ShardEntry:
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
    return write_shard(target, task.lane, task.number, pa.concat_tables(parts).cast(columns))


def _split_entry(folder: Path, tables: list[Path], shards: list[ShardEntry], columns: pa.Schema) -> SplitEntry:
    """Write a split's table of documents, chunk by chunk, and return its manifest entry."""
    documents = tokens = trained = 0
    path = folder / DOCUMENTS
    with atomic_file(path) as stream, pa.ipc.new_file(stream, columns) as writer:
        for part in tables:
            if part.is_file():
                table = read_staged(part)
                writer.write_table(table)
                documents += table.num_rows
                tokens += pc.sum(table["n_tokens"]).as_py()
                trained += pc.sum(table[N_TRAINED[0]]).as_py() if N_TRAINED[0] in columns.names else 0
    blocks = sum(shard.rows for shard in shards)
    pieces = sum(_pieces(folder / shard.file) for shard in shards)
    if sum(shard.tokens for shard in shards) != tokens:
        raise DataError(f"{folder}: shards hold other tokens than its documents; remove the folder and prepare again")
    return SplitEntry(
        documents=documents,
        tokens=tokens,
        predicted_tokens=trained if N_TRAINED[0] in columns.names else tokens - pieces,
        blocks=blocks,
        shards=shards,
        documents_sha256=file_sha256(path),
        largest_id=max((_largest_id(folder / shard.file) for shard in shards), default=0),
    )


def _largest_id(shard: Path) -> int:
    return int(pc.max(read_staged(shard)["input_ids"].combine_chunks().flatten()).as_py())


def _pieces(shard: Path) -> int:
    return int(pc.sum(pc.list_value_length(read_staged(shard)["segments"])).as_py())
