"""Where the scores of one prepared folder go: beside its shards, in a local folder or at an address."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dualtok.data.remote.remote import RemoteFolder
from dualtok.data.remote.storage import READ_ONLY
from dualtok.errors import ConfigError
from dualtok.files import file_sha256
from dualtok.reference.stored import (
    INDEX,
    SCORES,
    index_of_scores,
    is_scored,
    parse_index,
    read_index,
    score_path,
    scores_folder,
    write_index,
    write_scores,
)

if TYPE_CHECKING:
    import numpy as np

    from dualtok.data.manifest import ShardEntry
    from dualtok.data.remote.remote import Location
    from dualtok.reference.fingerprint import Fingerprint


class ScoreFiles:
    """The score files of one fingerprint. All ranks of a job write some of them, rank 0 the index in the end.

    At an address each file is one object, followed by a small one with its checksum; a host keeps nothing. A file
    counts as there when its checksum is. The fingerprint in the folder's name covers every shard.

    Args:
        location: the prepared data.
        fingerprint: of the losses.

    Raises:
        ConfigError: nothing can be written to the address.
    """

    def __init__(self, location: Location, fingerprint: Fingerprint) -> None:
        if isinstance(location, RemoteFolder) and location.storage.is_web_server:
            raise ConfigError(READ_ONLY.format(location))
        self._location, self._fingerprint = location, fingerprint
        self._name = f"{SCORES}/{fingerprint.digest}"
        self._known = self._read_index()

    def __str__(self) -> str:
        """Return the folder or its address."""
        return f"{self._location}/{self._name}"

    def checksum(self, split: str, shard: ShardEntry) -> str | None:
        """Return the SHA-256 of a shard's complete scores, or None if they are still to be made."""
        known = self._known.get(f"{split}/{shard.stem}.arrow")
        if isinstance(self._location, Path):
            path = score_path(scores_folder(self._location, self._fingerprint), split, shard.file)
            found = file_sha256(path) if is_scored(path, shard) else None
            return found if known in (None, found) else None
        if known is not None:
            return known
        try:
            told = json.loads(self._location.storage.read(f"{self._name}/{split}/{shard.stem}.json", patient=False))
        except (FileNotFoundError, ValueError):
            return None
        return str(told["sha256"])

    def write(self, split: str, shard: ShardEntry, losses: np.ndarray) -> str:
        """Write a shard's losses [rows, block_length] and return their SHA-256."""
        if isinstance(self._location, Path):
            path = score_path(scores_folder(self._location, self._fingerprint), split, shard.file)
            write_scores(path, losses, shard.sha256)
            return file_sha256(path)
        with TemporaryDirectory(prefix="dualtok-") as folder:
            path = Path(folder) / f"{shard.stem}.arrow"
            write_scores(path, losses, shard.sha256)
            told = path.with_suffix(".json")
            told.write_text(json.dumps({"sha256": file_sha256(path)}))
            for file in (path, told):
                self._location.storage.put(file, f"{self._name}/{split}/{file.name}")
            return file_sha256(path)

    def finish(self, model: str, files: dict[str, str]) -> None:
        """Write the index: the checksum of each ``split/file``; those of other splits stay in it."""
        if isinstance(self._location, Path):
            folder = scores_folder(self._location, self._fingerprint)
            for left in folder.glob("*/.*.tmp"):  # by a rank that was killed while it wrote
                left.unlink(missing_ok=True)
            write_index(folder, self._fingerprint, model, files)
            return
        with TemporaryDirectory(prefix="dualtok-") as temporary:
            index = Path(temporary) / INDEX
            index.write_text(index_of_scores(self._fingerprint, model, {**self._read_index(), **files}))
            self._location.storage.put(index, f"{self._name}/{INDEX}")

    def _read_index(self) -> dict[str, Any]:
        """Return the checksums of an earlier job, if it came to its end."""
        if isinstance(self._location, Path):
            folder = scores_folder(self._location, self._fingerprint)
            return dict(read_index(folder)["files"]) if (folder / INDEX).is_file() else {}
        name = f"{self._name}/{INDEX}"
        try:
            content = self._location.storage.read(name, patient=False)
        except FileNotFoundError:
            return {}
        return dict(parse_index(content, f"{self._location}/{name}")["files"])
