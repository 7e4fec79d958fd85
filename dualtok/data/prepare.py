"""``dualtok prepare``: documents to deduplicated, split, tokenised, packed and checksummed shards.

Four stages, each of which continues where an interruption left it: ingest (:mod:`dualtok.data.ingest`), the tokenizer,
one packed file per chunk of documents, and the shards. A finished file is never written again. Memory holds one chunk
of documents per process, whatever the size of the corpus. The manifest is written last.
"""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter

from dualtok.data.config import SPLITS, DataConfig, SplitName
from dualtok.data.ingest import Ingest, IngestCounts, read_staged
from dualtok.data.manifest import MANIFEST, Manifest, ShardEntry, SplitEntry, load_manifest, save_manifest
from dualtok.data.packing import pack_documents
from dualtok.data.parallel import Workers
from dualtok.data.shards import blocks_table, describe_shard, schema, shard_name, write_shard
from dualtok.data.stream import DOCUMENTS
from dualtok.data.tokenizer import encode, fingerprint, load_tokenizer, save_tokenizer, train_tokenizer
from dualtok.errors import ConfigError, DataError
from dualtok.files import atomic_file, file_sha256, write_text
from dualtok.monitor.progress import RunProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedTokenizerBase

STAGING = ".staging"
DEFAULT_VOCABULARY = 4096
CONFIG_ECHO = "prepare.json"
SCHEDULING = ("processes", "mix")
"""Settings that do not change the result."""
DOCUMENT = pa.schema([
    ("doc", pa.int64()), ("sha256", pa.string()), ("n_tokens", pa.int64()), ("n_characters", pa.int64()),
    ("zlib_bytes", pa.int64()),
])  # fmt: skip


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


def prepare(config: DataConfig, *, progress: bool = True) -> Manifest:
    """Prepare ``config.source`` into ``config.dir``, or return at once if that was done with the same settings.

    Args:
        config: the ``data`` section of a run.
        progress: whether to show progress and a summary.

    Raises:
        DataError: the source or the tokenizer cannot be read, the corpus is empty, or a split is.
        ConfigError: ``config.dir`` was prepared with other settings.
    """
    folder = Path(config.dir)
    echo = _result_settings(config)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: a file, not a folder to write prepared data into (data.dir)")
    _require_same_settings(folder, echo)
    if (folder / MANIFEST).is_file():
        manifest = load_manifest(folder)
        shutil.rmtree(folder / STAGING, ignore_errors=True)  # left if an earlier run was killed in its last moment
        _say(f"{folder}: already prepared", active=progress)
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    write_text(folder / CONFIG_ECHO, json.dumps(echo, indent=1, sort_keys=True))
    staging = folder / STAGING
    ingest = Ingest(config, staging)
    try:
        if config.tokenizer is not None:
            _keep_tokenizer(folder / "tokenizer", lambda: load_tokenizer(str(config.tokenizer)))
        with Workers(config.processes) as workers:
            with RunProgress("prepare: documents read", None, active=progress) as bar:
                counts = ingest.run(workers, bar)
            ingest.check()
            chunks = [ingest.chunk_path(number) for number in range(counts.chunks)]
            vocabulary = config.vocab_size or DEFAULT_VOCABULARY
            tokenizer = _keep_tokenizer(
                folder / "tokenizer", lambda: train_tokenizer(_texts(chunks, "reference"), vocabulary)
            )
            work = partial(
                _pack_chunk, tokenizer_folder=str(folder / "tokenizer"), tokenizer_fingerprint=fingerprint(tokenizer),
                block_length=config.block_length,
            )  # fmt: skip
            with RunProgress("prepare: chunks packed", len(chunks), active=progress) as bar:
                for _ in workers.map(work, chunks):
                    bar.advance(1)
            splits = _write_splits(config, folder, chunks, counts, workers, progress=progress)
    except BaseException:
        ingest.close()
        if not ingest.worth_keeping():
            _forget(folder)
        raise
    ingest.close()
    manifest = Manifest(
        config=echo, seed=config.seed, tokenizer_fingerprint=fingerprint(tokenizer), vocabulary=len(tokenizer),
        block_length=config.block_length, lanes=config.lanes, documents_read=counts.read,
        exact_duplicates=counts.exact_duplicates, near_duplicates=counts.near_duplicates, too_short=counts.too_short,
        unused=counts.unused, splits=splits,
    )  # fmt: skip
    save_manifest(manifest, folder)
    shutil.rmtree(staging)
    _say(summary(manifest), active=progress)
    return manifest


def summary(manifest: Manifest) -> str:
    """Return what was prepared, in a few lines."""
    lines = [
        f"{manifest.documents_read:,} documents read; left out: {manifest.exact_duplicates:,} exact and "
        f"{manifest.near_duplicates:,} near duplicates, {manifest.too_short:,} too short, "
        f"{manifest.unused:,} in no split"
    ]
    for name, split in manifest.splits.items():
        fill = split.tokens / max(1, split.blocks * manifest.block_length)
        lines.append(
            f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens in {split.blocks:,} blocks "
            f"({fill:.1%} full), {len(split.shards)} shards"
        )
    return "\n".join(lines)


def _result_settings(config: DataConfig) -> dict[str, object]:
    values: dict[str, object] = TypeAdapter(DataConfig).dump_python(config, mode="json")
    return {key: value for key, value in values.items() if key not in (*SCHEDULING, "dir")}


def _require_same_settings(folder: Path, echo: dict[str, object]) -> None:
    """Refuse to mix two preparations in one folder."""
    path = folder / CONFIG_ECHO
    if not path.is_file():
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for key in sorted(set(earlier) | set(echo)):
        if earlier.get(key) != echo.get(key):
            raise ConfigError(
                f"data.{key}: {echo.get(key)!r}, but {folder} was prepared with {earlier.get(key)!r}; choose another "
                "data.dir or remove the folder"
            )


def _sweep(folder: Path) -> None:
    """Remove the half-written files of a preparation that was killed."""
    for place in (folder, folder / STAGING, *(folder / split for split in SPLITS)):
        for path in place.glob(".*.tmp"):
            if path.is_file():
                path.unlink()


def _forget(folder: Path) -> None:
    """Remove what a preparation left that another start could not continue, so that nothing half-written stays."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    (folder / CONFIG_ECHO).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _keep_tokenizer(folder: Path, make: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """Load, convert or train the tokenizer once, and keep it beside the shards."""
    if not folder.is_dir():
        save_tokenizer(make(), folder)
    return load_tokenizer(folder)


def _texts(chunks: list[Path], split: str) -> Iterator[str]:
    for path in chunks:
        table = read_staged(path)
        yield from table.filter(pc.equal(table["split"], split))["text"].to_pylist()


@lru_cache(maxsize=1)
def _tokenizer_of_process(folder: str, _fingerprint: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer, loaded once per process: each load keeps some of its memory for good, megabytes and more.

    The fingerprint tells two tokenizers apart that lay in the same folder one after the other.
    """
    return load_tokenizer(folder)


def _pack_chunk(path: Path, *, tokenizer_folder: str, tokenizer_fingerprint: str, block_length: int) -> None:
    """Tokenise and pack one staged chunk, split by split; runs in a worker process."""
    done = path.with_suffix(".packed")
    if done.is_file():
        return
    staged = read_staged(path)
    tokenizer = _tokenizer_of_process(tokenizer_folder, tokenizer_fingerprint)
    for split in pc.unique(staged["split"]).to_pylist():
        part = staged.filter(pc.equal(staged["split"], split))
        texts, docs = part["text"].to_pylist(), part["doc"].to_pylist()
        ids = [np.array(row, dtype=np.int32) for row in encode(tokenizer, texts)]
        blocks = pack_documents(list(zip(docs, ids, strict=True)), block_length)
        documents = pa.Table.from_arrays([
            part["doc"], pa.array([digest.hex() for digest in part["sha256"].to_pylist()]),
            pa.array([len(row) for row in ids], pa.int64()), pa.array([len(text) for text in texts], pa.int64()),
            pa.array([len(zlib.compress(text.encode("utf-8"))) for text in texts], pa.int64()),
        ], schema=DOCUMENT)  # fmt: skip
        _write_table(_packed_path(path, split, "blocks"), blocks_table(blocks, block_length))
        _write_table(_packed_path(path, split, "table"), documents)
    write_text(done, "")


def _packed_path(chunk: Path, split: str, kind: str) -> Path:
    return chunk.with_name(f"{chunk.stem}-{split}-{kind}.arrow")


def _write_table(path: Path, table: pa.Table) -> None:
    with atomic_file(path) as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)


def _write_splits(
    config: DataConfig, folder: Path, chunks: list[Path], counts: IngestCounts, workers: Workers, *, progress: bool
) -> dict[str, SplitEntry]:
    """Deal each split's blocks to its lanes (block j to lane j mod L) and write the shards that are not there yet."""
    tasks: list[_ShardTask] = []
    entries: dict[SplitName, list[ShardEntry]] = {split: [] for split in SPLITS if split in counts.splits}
    for split in entries:
        packed = [p for chunk in chunks if (p := _packed_path(chunk, split, "blocks")).is_file()]
        tasks += _shard_tasks(split, packed, config.lanes, config.rows_per_shard)
    work = partial(_write_lane_shard, folder=folder, block_length=config.block_length)
    with RunProgress("prepare: shards", len(tasks), active=progress, plain_every=max(1, len(tasks) // 4)) as bar:
        for task, entry in zip(tasks, workers.map(work, tasks), strict=True):
            entries[task.split].append(entry)
            bar.advance(1)
    return {split: _split_entry(folder / split, chunks, split, shards) for split, shards in entries.items()}


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


def _split_entry(folder: Path, chunks: list[Path], split: str, shards: list[ShardEntry]) -> SplitEntry:
    """Write a split's table of documents, chunk by chunk, and return its manifest entry."""
    documents = tokens = 0
    path = folder / DOCUMENTS
    with atomic_file(path) as stream, pa.ipc.new_file(stream, DOCUMENT) as writer:
        for chunk in chunks:
            part = _packed_path(chunk, split, "table")
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
    )


def _pieces(shard: Path) -> int:
    return int(pc.sum(pc.list_value_length(read_staged(shard)["segments"])).as_py())


def _say(text: str, *, active: bool) -> None:
    if active:
        print(text, flush=True)
