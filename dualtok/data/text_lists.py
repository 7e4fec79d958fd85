"""Lists of texts as they are, as a prepared folder: neither deduplicated nor split, each list a split of its own."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from dualtok.data.chat.encoding import DocumentEncoder
from dualtok.data.chat.templates import ChatTemplateError
from dualtok.data.folder import DataFolder
from dualtok.data.manifest import CHAT_FORMAT_VERSION, FORMAT_VERSION, MANIFEST, ChatEntry, Manifest, save_manifest
from dualtok.data.prepare.assemble import DOCUMENT
from dualtok.data.subset import write_split
from dualtok.data.tokenizer import FOLDER, fingerprint, save_tokenizer, vocabulary_size
from dualtok.errors import DataError
from dualtok.files import atomic_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from dualtok.data.chat.encoding import Encoded

ROWS_PER_SHARD = 1024
LANES = 8
ROUNDED_TO = 64
"""A block that is as long as the longest text is rounded up to a multiple of this."""


class TextList(NamedTuple):
    """Some texts or conversations, and the group of each, e.g. the person that it is about."""

    texts: Sequence[str]
    groups: Sequence[str | None] | None = None
    """None where no field names groups."""
    origins: Sequence[str | None] | None = None
    """Where each conversation comes from, None for a text; None as a whole where there are texts alone."""

    @property
    def where(self) -> Sequence[str | None]:
        """``origins``, of each document."""
        return [None] * len(self.texts) if self.origins is None else self.origins

    def some(self, positions: Sequence[int]) -> TextList:
        """Return the documents at some positions, without groups."""
        origins = None if self.origins is None else [self.origins[i] for i in positions]
        return TextList([self.texts[i] for i in positions], origins=origins)


def pack_texts(
    root: Path, lists: Mapping[str, TextList], tokenizer: PreTrainedTokenizerBase, *, most_tokens: int
) -> DataFolder:
    """Tokenize and pack lists of texts, unless that was done before; blank texts are left out.

    Documents are numbered from 0, list after list, blank ones included. No end token closes a text: whether a model
    that was trained elsewhere saw one is not known. Of conversations the assistant's turns are what is predicted.

    Args:
        root: where the folder is made, under a name of its content.
        lists: name of a split -> its texts.
        tokenizer: of the models that will read them.
        most_tokens: longest block; texts that are longer are cut. Shorter ones alone make shorter blocks.

    Raises:
        DataError: a list has no text that is not blank, or the tokenizer's chat template is missing or does not tell
            which tokens are the assistant's.
    """
    target = root / _digest(lists, tokenizer, most_tokens)
    if not (target / MANIFEST).is_file():
        encoder = DocumentEncoder(tokenizer, end=False)
        try:
            encoded = {name: encoder.encode(given.texts, given.where) for name, given in lists.items()}
        except ChatTemplateError as error:
            raise DataError(f"{error}; an audit takes the template that is saved with the model's tokenizer") from None
        _write(target, lists, encoded, tokenizer, most_tokens)
    return DataFolder(str(target))


def _digest(lists: Mapping[str, TextList], tokenizer: PreTrainedTokenizerBase, most_tokens: int) -> str:
    """Name the folder by all that decides its content."""
    whole = hashlib.sha256(f"{fingerprint(tokenizer)}\n{most_tokens}".encode())
    for name, (texts, groups, origins) in lists.items():
        whole.update(f"\0{name}\0{len(texts)}".encode())
        for number, text in enumerate(texts):
            own = f"{text}\0{'' if groups is None else groups[number]}"
            if origins is not None and origins[number] is not None:
                own += f"\0{tokenizer.chat_template}"
            whole.update(hashlib.sha256(own.encode("utf-8", "surrogatepass")).digest())
    return whole.hexdigest()[:16]


def _write(
    target: Path,
    lists: Mapping[str, TextList],
    encoded: Mapping[str, list[Encoded]],
    tokenizer: PreTrainedTokenizerBase,
    most_tokens: int,
) -> None:
    longest = max((len(own.ids) for rows in encoded.values() for own in rows), default=0)
    conversations = {name: [origin is not None for origin in given.where] for name, given in lists.items()}
    masked = any(map(any, conversations.values()))
    block_length = max(2, min(most_tokens, -(-longest // ROUNDED_TO) * ROUNDED_TO))
    splits, first, blank = {}, 0, 0
    with atomic_folder(target) as folder:
        for name, given in lists.items():
            kept = [
                i
                for i, (text, own) in enumerate(zip(given.texts, encoded[name], strict=True))
                if text.strip() and len(own.ids)
            ]
            if not kept:
                raise DataError(f"audit: no {name.replace('_', '-')}: all {len(given.texts)} texts are blank")
            blank += len(given.texts) - len(kept)
            rows = [encoded[name][i] for i in kept]
            documents = [(first + i, own.ids) for i, own in zip(kept, rows, strict=True)]
            table = _table(documents, [given.texts[i] for i in kept], rows, _kept(given.groups, kept))
            trained = {doc: own.trained for (doc, _), own in zip(documents, rows, strict=True)} if masked else None
            splits[name] = write_split(
                folder / name, documents, table, lanes=LANES, shape=(ROWS_PER_SHARD, block_length), trained=trained
            )
            first += len(given.texts)
        save_tokenizer(tokenizer, folder / FOLDER)
        long = (len(own.ids) > block_length for name, rows in encoded.items() for own in rows)
        chat = sum(flags := [flag for name in lists for flag in conversations[name]])
        longer = sum(is_chat and is_long for is_chat, is_long in zip(flags, long, strict=True))
        manifest = Manifest(
            format_version=CHAT_FORMAT_VERSION if masked else FORMAT_VERSION,
            chat=ChatEntry(train_on="assistant", conversations=chat, longer=longer) if masked else None,
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
    documents: list[tuple[int, NDArray[np.int32]]],
    texts: list[str],
    rows: list[Encoded],
    groups: list[str | None] | None,
) -> pa.Table:
    """Return a split's table of documents, with the column ``group`` where there are groups."""
    contents = [text.encode("utf-8", "surrogatepass") for text in texts]
    columns = [
        pa.array([number for number, _ in documents], pa.int64()),
        pa.array([hashlib.sha256(content).hexdigest() for content in contents]),
        pa.array([len(ids) for _, ids in documents], pa.int64()),
        pa.array([own.n_characters for own in rows], pa.int64()),
        pa.array([own.zlib_bytes for own in rows], pa.int64()),
    ]
    table = pa.Table.from_arrays(columns, schema=DOCUMENT)
    return table if groups is None else table.append_column("group", pa.array(groups, pa.string()))
