"""Reference losses beside the shards: written once by ``dualtok score``, read back with the tokens.

Layout: ``<data.dir>/scores/<fingerprint>/<split>/<shard stem>.arrow``, one float32 row of ``block_length`` losses per
block, and ``scores.json`` (written last) with the fingerprint's parts and every file's checksum.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from dualtok.data.remote.remote import Location, RemoteFile, RemoteFolder
from dualtok.data.remote.storage import BadShardError
from dualtok.data.shards import only_chunk
from dualtok.errors import DataError
from dualtok.files import atomic_file, file_sha256, write_text
from dualtok.reference.fingerprint import Fingerprint

if TYPE_CHECKING:
    from dualtok.data.folder import DataFolder
    from dualtok.data.manifest import ShardEntry

SCORES = "scores"
COLUMN = "loss"
SHARD_KEY = b"shard_sha256"
INDEX = "scores.json"


def scores_folder(data_dir: str | Path, fingerprint: Fingerprint) -> Path:
    """Return where the scores of a fingerprint lie."""
    return Path(data_dir) / SCORES / fingerprint.digest


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
    write_text(folder / INDEX, index_of_scores(fingerprint, model, {**known, **files}))


def index_of_scores(fingerprint: Fingerprint, model: str, files: dict[str, str]) -> str:
    """Return the content of ``scores.json``."""
    index = {"fingerprint": asdict(fingerprint), "model": model, "files": files}
    return json.dumps(index, indent=1, sort_keys=True)


def read_index(folder: Path) -> dict[str, Any]:
    """Read ``scores.json``.

    Raises:
        DataError: it is missing or malformed.
    """
    try:
        return parse_index((folder / INDEX).read_bytes(), f"{folder}/{INDEX}")
    except FileNotFoundError:
        raise DataError(_unfinished(f"{folder}/{INDEX}")) from None


def parse_index(content: bytes, origin: str) -> dict[str, Any]:
    """Return the content of a ``scores.json``.

    Raises:
        DataError: it is malformed.
    """
    try:
        index: dict[str, Any] = json.loads(content.decode("utf-8"))
        Fingerprint(**index["fingerprint"])
        if not all(re.fullmatch("[0-9a-f]{64}", checksum) for checksum in index["files"].values()):
            raise ValueError("a checksum is none")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{origin}: malformed ({error}); delete the folder and run `dualtok score` again") from None
    return index


def _unfinished(index: str) -> str:
    return f"{index}: missing, so scoring did not finish; run `dualtok score` again to continue it"


class StoredLosses:
    """The reference losses of one split, each file checked against the index and the manifest.

    Those of a local folder are checked before the first is used, those at an address as each arrives.

    Args:
        folder: the prepared data.
        split: the split to read.
        expected: the fingerprint that the run's reference model must have.
        rank: this rank; it hashes every ``world_size``-th local file, so that the job as a whole hashes each once.
        world_size: ranks of the job.
        on_bad_shard: ``skip`` leaves errors about single files to :meth:`read`, which then hashes each that it opens.

    Raises:
        DataError: scores are missing, of another reference, tokenizer, precision or shard, truncated or altered.
    """

    def __init__(
        self,
        folder: DataFolder,
        split: str,
        expected: Fingerprint,
        *,
        rank: int = 0,
        world_size: int = 1,
        on_bad_shard: Literal["stop", "skip"] = "stop",
    ) -> None:
        self._location, manifest = folder.location, folder.manifest
        split_folder = manifest.folder_of(split)
        name = f"{SCORES}/{expected.digest}"
        index = _index_of(self._location, name, split_folder, expected)
        self._skips = on_bad_shard == "skip"
        self._shards = {shard.stem: shard for shard in manifest.splits[split].shards}
        checksums = index["files"]
        self._files = {
            stem: RemoteFile(f"{name}/{split_folder}/{stem}.arrow", checksums.get(f"{split_folder}/{stem}.arrow", ""))
            for stem in self._shards
        }
        self._open: OrderedDict[str, np.ndarray] = OrderedDict()
        self._most_open = manifest.lanes + 1
        for number, stem in enumerate(self._shards):
            try:
                self._check(stem, hashed=number % world_size == rank)
            except BadShardError:
                if not self._skips:
                    raise

    def read(self, shard_stem: str, rows: np.ndarray) -> np.ndarray:
        """Return the losses [len(rows), block_length] float32 of some rows of a shard; memory-mapped.

        Raises:
            BadShardError: they are missing, or not those of this shard.
            DataError: they cannot be read.
        """
        if shard_stem not in self._open:
            while len(self._open) >= self._most_open:
                self._open.popitem(last=False)
            self._open[shard_stem] = self._map(shard_stem)
        self._open.move_to_end(shard_stem)
        return self._open[shard_stem][rows]

    def prefetch(self, shard_stem: str) -> None:
        """Fetch a shard's losses in the background, if they lie at an address."""
        if isinstance(self._location, RemoteFolder) and self._files[shard_stem].sha256:
            self._location.prefetch(self._files[shard_stem])

    def _check(self, stem: str, *, hashed: bool) -> None:
        """Check a file as far as that costs no transfer."""
        file, shard = self._files[stem], self._shards[stem]
        path = f"{self._location}/{file.name}"
        again = "run `dualtok score` again"
        is_local = isinstance(self._location, Path)
        if not file.sha256 or (is_local and not Path(path).is_file()):
            raise BadShardError(f"{path}: no reference losses for shard {shard.file}; {again}")
        if is_local and hashed and file_sha256(path) != file.sha256:
            raise BadShardError(
                f"{path}: checksum differs from {INDEX}, the scores of shard {shard.file} were "
                f"altered; delete the file and {again}"
            )
        if is_local and not is_scored(Path(path), shard):
            raise BadShardError(
                f"{path}: these scores were made from another version of shard {shard.file}; "
                f"delete the file and {again}"
            )

    def _map(self, stem: str) -> np.ndarray:
        file = self._files[stem]
        if isinstance(self._location, Path):
            if self._skips:
                self._check(stem, hashed=True)
            return _read_losses(self._location / file.name)
        self._check(stem, hashed=True)
        return self._location.open(file, lambda path: self._arrived(stem, path))

    def _arrived(self, stem: str, path: Path) -> np.ndarray:
        if not is_scored(path, self._shards[stem]):
            raise BadShardError(
                f"{self._location}/{self._files[stem].name}: these scores were made from another version of shard "
                f"{self._shards[stem].file}; run `dualtok score` again"
            )
        return _read_losses(path)

    def __getstate__(self) -> dict[str, object]:
        """Leave memory maps behind: a data worker opens its own."""
        return {**self.__dict__, "_open": OrderedDict()}


def _read_losses(path: Path) -> np.ndarray:
    with pa.memory_map(str(path)) as source:
        column = only_chunk(pa.ipc.open_file(source).read_all(), COLUMN)
    flat: np.ndarray = column.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(len(column), -1)


def _index_of(location: Location, name: str, split: str, expected: Fingerprint) -> dict[str, Any]:
    """Return the index of the expected scores.

    Raises:
        DataError: there are no such scores, or not all of them.
    """
    if isinstance(location, Path):
        if not (location / name).is_dir():
            raise DataError(_no_such_scores(location, split, expected))
        return read_index(location / name)
    try:
        return parse_index(location.storage.read(f"{name}/{INDEX}", patient=False), f"{location}/{name}/{INDEX}")
    except FileNotFoundError:
        if not location.storage.is_web_server and location.storage.names(name):
            raise DataError(_unfinished(f"{location}/{name}/{INDEX}")) from None
        raise DataError(_no_such_scores(location, split, expected)) from None


def _other_indices(location: Location) -> list[dict[str, Any]]:
    """Return the indices of all finished scores, as far as their names can be had."""
    storage = location.storage if isinstance(location, RemoteFolder) else None
    if storage is None:
        names = sorted(folder.name for folder in (Path(str(location)) / SCORES).glob("*/"))
    else:
        names = [] if storage.is_web_server else storage.names(SCORES)
    found: list[dict[str, Any]] = []
    for name in (f"{SCORES}/{name}/{INDEX}" for name in names):
        try:
            content = Path(f"{location}/{name}").read_bytes() if storage is None else storage.read(name, patient=False)
            found.append(parse_index(content, name))
        except (DataError, OSError):
            continue
    return found


def _no_such_scores(location: Location, split: str, expected: Fingerprint) -> str:
    """Say that scores are missing, and if there are others, in what they differ."""
    found = []
    for index in _other_indices(location):
        parts = ", ".join(Fingerprint(**index["fingerprint"]).differences(expected))
        found.append(f"those of {index['model']} differ in: {parts}")
    others = f" ({'; '.join(found)})" if found else ""
    wanted = f"no reference losses of this run's reference model for split {split!r}"
    return f"{location}: {wanted}{others}; run `dualtok score`"
