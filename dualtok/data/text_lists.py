"""Lists of texts as they are, as a prepared folder: neither deduplicated nor split, each list a split of its own."""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from dualtok.data.folder import DataFolder
from dualtok.data.manifest import MANIFEST, Manifest, save_manifest
from dualtok.data.prepare.assemble import DOCUMENT
from dualtok.data.subset import write_split
from dualtok.data.tokenizer import FOLDER, encode, fingerprint, save_tokenizer, vocabulary_size
from dualtok.errors import DataError
from dualtok.files import atomic_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

ROWS_PER_SHARD = 1024
LANES = 8
ROUNDED_TO = 64
"""A block that is as long as the longest text is rounded up to a multiple of this."""
ENCODED_AT_ONCE = 4096
"""Texts whose token ids are in memory as Python's integers at one time."""


class TextList(NamedTuple):
    """Some texts, and the group of each, e.g. the person that it is about."""

    texts: Sequence[str]
    groups: Sequence[str | None] | None = None
    """None where no field names groups."""


def pack_texts(
    root: Path, lists: Mapping[str, TextList], tokenizer: PreTrainedTokenizerBase, *, most_tokens: int
) -> DataFolder:
    """Tokenize and pack lists of texts, unless that was done before; blank texts are left out.

    Documents are numbered from 0, list after list, blank ones included. No end token closes them: whether a model that
    was trained elsewhere saw one is not known.

    Args:
        root: where the folder is made, under a name of its content.
        lists: name of a split -> its texts.
        tokenizer: of the models that will read them.
        most_tokens: longest block; texts that are longer are cut. Shorter ones alone make shorter blocks.

    Raises:
        DataError: a list has no text that is not blank.
    """
    target = root / _digest(lists, tokenizer, most_tokens)
    if not (target / MANIFEST).is_file():
        encoded = {name: _encoded(tokenizer, texts) for name, texts in lists.items()}
        _write(target, lists, encoded, tokenizer, most_tokens)
    return DataFolder(str(target))


def _digest(lists: Mapping[str, TextList], tokenizer: PreTrainedTokenizerBase, most_tokens: int) -> str:
    """Name the folder by all that decides its content."""
    whole = hashlib.sha256(f"{fingerprint(tokenizer)}\n{most_tokens}".encode())
    for name, (texts, groups) in lists.items():
        whole.update(f"\0{name}\0{len(texts)}".encode())
        for number, text in enumerate(texts):
            own = f"{text}\0{'' if groups is None else groups[number]}"
            whole.update(hashlib.sha256(own.encode("utf-8", "surrogatepass")).digest())
    return whole.hexdigest()[:16]


def _encoded(tokenizer: PreTrainedTokenizerBase, given: TextList) -> list[NDArray[np.int32]]:
    found = []
    for first in range(0, len(given.texts), ENCODED_AT_ONCE):
        some = list(given.texts[first : first + ENCODED_AT_ONCE])
        found += [np.array(ids, dtype=np.int32) for ids in encode(tokenizer, some, end=False)]
    return found


def _write(
    target: Path,
    lists: Mapping[str, TextList],
    encoded: Mapping[str, list[NDArray[np.int32]]],
    tokenizer: PreTrainedTokenizerBase,
    most_tokens: int,
) -> None:
    longest = max((len(ids) for rows in encoded.values() for ids in rows), default=0)
    block_length = max(2, min(most_tokens, -(-longest // ROUNDED_TO) * ROUNDED_TO))
    splits, first, blank = {}, 0, 0
    with atomic_folder(target) as folder:
        for name, given in lists.items():
            kept = [
                i
                for i, (text, ids) in enumerate(zip(given.texts, encoded[name], strict=True))
                if text.strip() and len(ids)
            ]
            if not kept:
                raise DataError(f"audit: no {name.replace('_', '-')}: all {len(given.texts)} texts are blank")
            blank += len(given.texts) - len(kept)
            documents = [(first + i, encoded[name][i]) for i in kept]
            table = _table(documents, [given.texts[i] for i in kept], _kept(given.groups, kept))
            splits[name] = write_split(
                folder / name, documents, table, lanes=LANES, shape=(ROWS_PER_SHARD, block_length)
            )
            first += len(given.texts)
        save_tokenizer(tokenizer, folder / FOLDER)
        manifest = Manifest(
            config={"texts": list(lists)},
            seed=0,
            tokenizer_fingerprint=fingerprint(tokenizer),
            vocabulary=vocabulary_size(tokenizer),
            block_length=block_length,
            lanes=LANES,
            documents_read=first,
            exact_duplicates=0,
            near_duplicates=0,
            too_short=blank,
            unused=0,
            splits=splits,
        )
        save_manifest(manifest, folder)


def _kept(groups: Sequence[str | None] | None, kept: list[int]) -> list[str | None] | None:
    return None if groups is None else [groups[i] for i in kept]


def _table(
    documents: list[tuple[int, NDArray[np.int32]]], texts: list[str], groups: list[str | None] | None
) -> pa.Table:
    """Return a split's table of documents, with the column ``group`` where there are groups."""
    contents = [text.encode("utf-8", "surrogatepass") for text in texts]
    columns = [
        pa.array([number for number, _ in documents], pa.int64()),
        pa.array([hashlib.sha256(content).hexdigest() for content in contents]),
        pa.array([len(ids) for _, ids in documents], pa.int64()),
        pa.array([len(text) for text in texts], pa.int64()),
        pa.array([len(zlib.compress(content)) for content in contents], pa.int64()),
    ]
    table = pa.Table.from_arrays(columns, schema=DOCUMENT)
    return table if groups is None else table.append_column("group", pa.array(groups, pa.string()))
