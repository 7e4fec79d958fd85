"""Reference losses beside the shards: written once by ``dualtok score``, read back with the tokens.

Layout: ``<data.dir>/scores/<fingerprint>/<split>/<shard stem>.arrow``, one float32 row of ``block_length`` losses per
block, and ``scores.json`` (written last) with the fingerprint's parts and every file's checksum.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dualtok.errors import DataError
from dualtok.files import atomic_file, file_sha256
from dualtok.reference.fingerprint import Fingerprint

if TYPE_CHECKING:
    from dualtok.data.manifest import Manifest, ShardEntry

COLUMN = "loss"
SHARD_KEY = b"shard_sha256"
INDEX = "scores.json"


def scores_folder(data_dir: str | Path, fingerprint: Fingerprint) -> Path:
    """Return where the scores of a fingerprint lie."""
    return Path(data_dir) / "scores" / fingerprint.digest


def score_path(folder: Path, split: str, shard_file: str) -> Path:
    """Return the score file that belongs to a shard."""
    return folder / split / f"{Path(shard_file).stem}.arrow"


def write_scores(path: Path, losses: np.ndarray, shard_sha256: str) -> None:
    """Write one shard's losses atomically.

    Args:
        path: the score file.
        losses: [rows, block_length] float32.
        shard_sha256: checksum of the shard that was scored.

    Raises:
        DataError: a loss is not finite.
    """
    if not np.isfinite(losses).all():
        row = int(np.argwhere(~np.isfinite(losses))[0][0])
        raise DataError(
            f"{path.name}: the reference model gives a loss that is not finite in row {row}; check its weights"
        )
    values = pa.FixedSizeListArray.from_arrays(pa.array(losses.astype(np.float32).ravel()), losses.shape[1])
    table = pa.table({COLUMN: values}).replace_schema_metadata({SHARD_KEY: shard_sha256.encode()})
    with atomic_file(path) as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)


def is_scored(path: Path, shard: ShardEntry) -> bool:
    """Return whether ``path`` holds the complete scores of exactly this shard."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            metadata = reader.schema.metadata or {}
            rows = sum(reader.get_batch(index).num_rows for index in range(reader.num_record_batches))
    except (OSError, pa.ArrowInvalid):
        return False
    return metadata.get(SHARD_KEY) == shard.sha256.encode() and rows == shard.rows


def write_index(folder: Path, fingerprint: Fingerprint, model: str, files: dict[str, str]) -> None:
    """Write ``scores.json``: the parts of the fingerprint and the checksum of each ``split/file``; merged with an
    earlier one of other splits."""
    known = read_index(folder).get("files", {}) if (folder / INDEX).is_file() else {}
    index = {"fingerprint": asdict(fingerprint), "model": model, "files": {**known, **files}}
    with atomic_file(folder / INDEX) as stream:
        stream.write(json.dumps(index, indent=1, sort_keys=True).encode())


def read_index(folder: Path) -> dict[str, Any]:
    """Read ``scores.json``.

    Raises:
        DataError: it is missing or malformed.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        Fingerprint(**index["fingerprint"])
    except FileNotFoundError:
        raise DataError(
            f"{path}: missing, so scoring did not finish; run `dualtok score` again to continue it"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: malformed ({error}); delete the folder and run `dualtok score` again") from None
    return index


class StoredScores:
    """The reference losses of one split, checked against the manifest before the first is used.

    Args:
        data_dir: the prepared data.
        manifest: its manifest.
        split: the split to read.
        expected: the fingerprint that the run's reference model must have.
        rank: this rank; it hashes every ``world_size``-th file, so that the job as a whole hashes each file once.
        world_size: ranks of the job.

    Raises:
        DataError: scores are missing, of another reference, tokenizer, precision or shard, truncated or altered.
    """

    def __init__(
        self,
        data_dir: str | Path,
        manifest: Manifest,
        split: str,
        expected: Fingerprint,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.folder = scores_folder(data_dir, expected)
        if not self.folder.is_dir():
            raise DataError(_no_such_scores(Path(data_dir), split, expected))
        index = read_index(self.folder)
        self._maps: dict[str, np.ndarray] = {}
        self._files: dict[str, Path] = {}
        for number, shard in enumerate(manifest.splits[split].shards):
            path = score_path(self.folder, split, shard.file)
            checksum = index["files"].get(f"{split}/{path.name}")
            self._check(path, shard, checksum, split, hashed=number % world_size == rank)
            self._files[Path(shard.file).stem] = path

    @staticmethod
    def _check(path: Path, shard: ShardEntry, checksum: str | None, split: str, *, hashed: bool) -> None:
        again = "run `dualtok score` again"
        if checksum is None or not path.is_file():
            raise DataError(f"{path}: no reference losses for shard {split}/{shard.file}; {again}")
        if hashed and file_sha256(path) != checksum:
            raise DataError(f"{path}: checksum differs from {INDEX}, the scores of shard {shard.file} were altered; "
                            f"delete the file and {again}")  # fmt: skip
        if not is_scored(path, shard):
            raise DataError(f"{path}: these scores were made from another version of shard {shard.file}; "
                            f"delete the file and {again}")  # fmt: skip

    def read(self, shard_stem: str, rows: np.ndarray) -> np.ndarray:
        """Return the losses [len(rows), block_length] float32 of some rows of a shard; memory-mapped."""
        if shard_stem not in self._maps:
            with pa.memory_map(str(self._files[shard_stem])) as source:
                column = pa.ipc.open_file(source).read_all().column(COLUMN).combine_chunks()
            flat = column.flatten().to_numpy(zero_copy_only=True)
            self._maps[shard_stem] = flat.reshape(len(column), -1)
        return self._maps[shard_stem][rows]


def _no_such_scores(data_dir: Path, split: str, expected: Fingerprint) -> str:
    """Say that scores are missing, and if there are others, in what they differ."""
    found = []
    for folder in sorted((data_dir / "scores").glob("*/")):
        try:
            index = read_index(folder)
        except DataError:
            continue
        parts = ", ".join(Fingerprint(**index["fingerprint"]).differences(expected))
        found.append(f"those of {index['model']} differ in: {parts}")
    others = f" ({'; '.join(found)})" if found else ""
    return (
        f"{data_dir}: no reference losses of this run's reference model for split {split!r}{others}; "
        "run `dualtok score`"
    )
