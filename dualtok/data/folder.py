"""A prepared folder as its readers take it, opened once: its manifest, its tokenizer, its splits."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from dualtok.data.manifest import DOCUMENTS, load_manifest, split_entry
from dualtok.data.remote.remote import RemoteFile, RemoteFolder, location_of
from dualtok.data.stream.blocks import BlockStream
from dualtok.data.tokenizer import load_data_tokenizer, vocabulary_size
from dualtok.errors import DataError
from dualtok.files import file_sha256

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from dualtok.config.data import DataConfig
    from dualtok.data.manifest import Manifest, SplitEntry
    from dualtok.data.packing import Segment
    from dualtok.data.remote.remote import Location

READ_AT_ONCE = 256


class HeldId(NamedTuple):
    """A token id, and a document that holds it."""

    id: int
    document: int
    split: str


class DataFolder:
    """Prepared data, local or at an address; its parts are read when they are asked for, once.

    Args:
        location: the prepared folder, or its address.
        manifest: its manifest, where it has been read already.

    Raises:
        DataError: the folder is not prepared.
    """

    def __init__(self, location: str | Location, manifest: Manifest | None = None) -> None:
        self.location = location_of(location)
        self.manifest = load_manifest(self.location) if manifest is None else manifest
        self._tables: dict[str, pa.Table] = {}

    @classmethod
    def of_run(cls, data: DataConfig) -> DataFolder:
        """Return the data of a run.

        Raises:
            DataError: the folder is not prepared.
        """
        return cls(location_of(data.dir, data.stream))

    def __str__(self) -> str:
        """Return the folder or its address."""
        return str(self.location)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that made the blocks."""
        return load_data_tokenizer(self.location, self.manifest)

    @property
    def encodes_special_tokens(self) -> bool:
        """Whether special tokens that a text spells out became these tokens (``data.special_tokens_in_text``)."""
        return self.manifest.config.get("special_tokens_in_text") == "encode"

    def entry(self, split: str) -> SplitEntry:
        """Return what the manifest says of a split.

        Raises:
            DataError: the data was prepared without it.
        """
        return split_entry(self.manifest, split, self.location)

    def open(self, split: str, *, seed: int = 0, **options: Any) -> BlockStream:
        """Return the blocks of a split.

        Args:
            split: its name.
            seed: of the order.
            **options: see :class:`.stream.blocks.BlockStream`.

        Raises:
            DataError: the split does not exist, or a shard is missing, truncated or altered.
        """
        return BlockStream(self.location, self.manifest, split, seed=seed, **options)

    def documents(self, split: str) -> pa.Table:
        """Return one row per document of a split: doc, sha256 (of its text), n_tokens, n_characters, zlib_bytes, and
        group where the data was prepared with ``data.group_field``.

        Raises:
            DataError: the split does not exist, or the table is missing or altered.
        """
        if split not in self._tables:
            self._tables[split] = self._read_documents(split, self.entry(split).documents_sha256)
        return self._tables[split]

    @cached_property
    def largest_id(self) -> int:
        """The largest token id that a block holds.

        A folder of an earlier version does not tell it, and is read through where the tokenizer alone cannot.
        """
        known = [entry.largest_id for entry in self.manifest.splits.values()]
        if all(largest is not None for largest in known):
            return max((largest for largest in known if largest is not None), default=0)
        return max((int(np.max(found)) for _, found, _ in self._ids()), default=0)

    def holds(self, at_least: int) -> HeldId | None:
        """Return a token id of the blocks that is not below ``at_least``, with its document; None if there is none."""
        if at_least >= vocabulary_size(self.tokenizer) or at_least > self.largest_id:
            return None
        for split, row, pieces in self._ids():
            if len(where := np.flatnonzero(row >= at_least)):
                ends = np.cumsum([piece.length for piece in pieces])
                return HeldId(int(row[where[0]]), pieces[int(np.searchsorted(ends, where[0], "right"))].doc, split)
        return None

    def _ids(self) -> Iterator[tuple[str, NDArray[np.int64], list[Segment]]]:
        """Yield split, token ids and pieces of each block; padding, at its end, is not among the ids."""
        for split, entry in self.manifest.splits.items():
            if not entry.blocks:
                continue
            for batch, pieces in self.open(split, verify=False).sequential(READ_AT_ONCE):
                for row, own in zip(batch["input_ids"].numpy(), pieces, strict=True):
                    if own:  # a batch is filled up with rows of none
                        yield split, row[: sum(piece.length for piece in own)], own

    def _read_documents(self, split: str, sha256: str) -> pa.Table:
        name = f"{self.manifest.folder_of(split)}/{DOCUMENTS}"
        if isinstance(self.location, RemoteFolder):
            return self.location.open(RemoteFile(name, sha256), _read_table)
        path = self.location / name
        if not path.is_file() or file_sha256(path) != sha256:
            raise DataError(f"{path}: missing or altered; remove the folder and run `dualtok prepare` again")
        return _read_table(path)


def _read_table(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()
