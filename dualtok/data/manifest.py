"""``manifest.json``: what a prepared folder holds, with every shard's checksum. Written last, so it is there only when
all is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dualtok.data.remote.remote import Location, RemoteFolder, location_of
from dualtok.data.remote.storage import BadShardError
from dualtok.errors import DataError
from dualtok.files import FileName, file_sha256, write_text

MANIFEST = "manifest.json"
DOCUMENTS = "documents.arrow"
"""A split's table of documents."""
OLD_AUXILIARY = "probe"
"""Name of the split ``auxiliary`` in folders prepared before 0.2."""
FORMAT_VERSION, CHAT_FORMAT_VERSION = 1, 2
"""Of folders whose tokens are all trained, and of those with a mask, which an older dualtok must not read."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardEntry(_Entry):
    """One shard file of a split."""

    file: FileName
    lane: int
    rows: int
    """Blocks."""
    tokens: int
    """Tokens that are not padding."""
    bytes: int
    sha256: Sha256

    @property
    def stem(self) -> str:
        """File name without its suffix; score files carry the same."""
        return Path(self.file).stem


class SplitEntry(_Entry):
    """One split."""

    documents: int
    tokens: int
    predicted_tokens: int
    """Tokens with a loss: all but the first of each piece, or those of them that are trained."""
    blocks: int
    shards: list[ShardEntry]
    documents_sha256: Sha256
    """Checksum of the split's table of documents."""
    largest_id: int | None = None
    """The largest token id in it; None in a folder of an earlier version."""
    folder: FileName | None = None
    """Its folder, where that has another name than the split."""


class CanariesEntry(_Entry):
    """The file of the canaries, included and kept out."""

    file: FileName
    count: int
    included: int
    """Those that are documents of the split ``train``."""
    sha256: Sha256
    seen: int | None = None
    """Of ``new_tokens``: how often the commonest of their tokens occurs in other documents."""


class Facts(_Entry):
    """What ``prepare`` has seen of the texts that nobody asked about, and says in its summary."""

    compared_by_characters: int
    """Documents in scripts without spaces, whose near duplicates were found by n-grams of characters."""
    with_special_tokens: int
    """Documents that spell out a special token of the tokenizer."""
    sampled: int
    """Documents that were encoded and decoded again."""
    lost: dict[str, int]
    """What was lost on the way -> in how many of them."""
    shared_passages: float | None
    """Share of the split ``held_out`` that has a passage in common with ``train``; None if one of them is missing."""
    left_out_files: int
    """Files of the source's folder that were not read."""


class ChatEntry(_Entry):
    """What is trained of a folder with conversations."""

    train_on: Literal["assistant", "last", "all"]
    """As ``data.train_on``."""
    conversations: int
    """Documents that are conversations."""
    longer: int
    """Of them, those longer than a block, whose later pieces are read without what was said before."""


class Manifest(_Entry):
    """A prepared data folder."""

    format_version: int = FORMAT_VERSION
    config: dict[str, Any]
    """The ``data`` section that made it."""
    seed: int
    tokenizer_fingerprint: str
    vocabulary: int
    """The tokenizer's largest id and one: its number of ids where they have no holes."""
    block_length: int
    lanes: int
    documents_read: int
    exact_duplicates: int
    near_duplicates: int
    too_short: int
    unused: int
    """Documents in no split."""
    splits: dict[FileName, SplitEntry]
    canaries: CanariesEntry | None = None
    """None if the folder was prepared without; they are not among the documents read."""
    facts: Facts | None = None
    """None in a folder of an earlier version, and in a subset."""
    chat: ChatEntry | None = None
    """None in a folder without conversations."""

    @property
    def is_masked(self) -> bool:
        """Whether the shards say which tokens are trained; without it all are."""
        return self.chat is not None and self.chat.train_on != "all"

    def folder_of(self, split: str) -> str:
        """Return the name of a split's folder."""
        return self.splits[split].folder or split


def load_manifest(data_dir: str | Location) -> Manifest:
    """Read a prepared folder's manifest.

    Raises:
        DataError: the folder is not prepared, or the manifest is malformed or of another version; or the address
            cannot be read.
        ConfigError: no address can be read that way.
    """
    location = location_of(data_dir)
    path = f"{location}/{MANIFEST}"
    try:
        if isinstance(location, RemoteFolder):
            content = location.storage.read(MANIFEST, patient=False)
        else:
            content = (location / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: missing, so this data is not (completely) prepared; run `dualtok prepare`") from None
    try:
        values = json.loads(content.decode("utf-8"))
        version = values.get("format_version")
        if version not in (FORMAT_VERSION, CHAT_FORMAT_VERSION):
            raise DataError(
                f"{path}: format version {version}, this dualtok reads {FORMAT_VERSION} and {CHAT_FORMAT_VERSION}; "
                "prepare the data again"
            )
        return _with_new_names(Manifest.model_validate(values))
    except (ValueError, AttributeError, ValidationError) as error:
        raise DataError(f"{path}: malformed: {' '.join(str(error).split())[:160]}; prepare the data again") from None


def _with_new_names(manifest: Manifest) -> Manifest:
    """Return the manifest with the splits' present names; ``probe`` of folders before 0.2 is ``auxiliary``."""
    if OLD_AUXILIARY not in manifest.splits:
        return manifest
    splits = {
        "auxiliary" if name == OLD_AUXILIARY else name: (
            entry.model_copy(update={"folder": name}) if name == OLD_AUXILIARY else entry
        )
        for name, entry in manifest.splits.items()
    }
    return manifest.model_copy(update={"splits": splits})


def save_manifest(manifest: Manifest, data_dir: str | Path) -> None:
    """Write a folder's manifest atomically."""
    write_text(Path(data_dir) / MANIFEST, manifest.model_dump_json(indent=1))


def split_entry(manifest: Manifest, split: str, data_dir: str | Location) -> SplitEntry:
    """Return a split's entry.

    Raises:
        DataError: the data was prepared without it.
    """
    if split not in manifest.splits:
        raise DataError(
            f"{data_dir}: prepared without split {split!r} (it has {', '.join(manifest.splits)}); add it to data.shares"
        )
    return manifest.splits[split]


def check_shard(path: Path, shard: ShardEntry, *, hashed: bool = True) -> None:
    """Refuse a shard that is not byte for byte the one in the manifest.

    Raises:
        BadShardError: it is missing, truncated or altered.
    """
    again = "restore it, or remove the folder and run `dualtok prepare` again"
    if not path.is_file():
        raise BadShardError(f"{path}: shard is missing; {again}")
    if (size := path.stat().st_size) != shard.bytes:
        raise BadShardError(f"{path}: shard has {size} bytes, the manifest says {shard.bytes}; {again}")
    if hashed and file_sha256(path) != shard.sha256:
        raise BadShardError(f"{path}: shard was altered, its checksum differs from the manifest's; {again}")
