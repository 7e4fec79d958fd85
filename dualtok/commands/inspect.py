"""``dualtok inspect``: what a prepared folder holds, as a model is going to read it."""

from __future__ import annotations

import os
import sys
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from dualtok.data.folder import DataFolder
from dualtok.data.stream.documents import document_pieces
from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from dualtok.data.stream.documents import Piece

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
OPEN, CLOSE = "⟦", "⟧"
"""Around trained tokens where there is no color."""
CUT = "✂"
"""Where a document goes on in another block."""


def inspect_data(folder: str, split: str, *, samples: int, blocks: int, color: bool | None) -> None:
    """Print the first documents of a split with the tokens that have a loss, and its first blocks.

    Args:
        folder: the prepared folder, or its address.
        split: one of its splits.
        samples: documents to show.
        blocks: blocks to list.
        color: whether to show trained tokens in color; None: on a terminal, unless ``NO_COLOR`` is set.

    Raises:
        DataError: the folder is not prepared, has no such split, or a shard is missing or altered.
    """
    data = DataFolder(folder)
    in_color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") if color is None else color
    for line in (
        *_heading(data, split),
        *_documents(data, split, samples, in_color=in_color),
        *_blocks(data, split, blocks),
    ):
        print(line)


def _heading(data: DataFolder, split: str) -> Iterator[str]:
    entry, chat = data.entry(split), data.manifest.chat
    yield (
        f"{data}, {split}: {entry.documents:,} documents, {entry.tokens:,} tokens in {entry.blocks:,} blocks of "
        f"{data.manifest.block_length:,}; {entry.predicted_tokens:,} tokens have a loss"
    )
    if chat is not None:
        yield f"conversations: {chat.conversations:,} in all splits, data.train_on: {chat.train_on}"


def _documents(data: DataFolder, split: str, samples: int, *, in_color: bool) -> Iterator[str]:
    """Yield the texts of some documents, trained tokens marked; the first token of a piece is never trained."""
    table = data.documents(split).slice(0, samples)
    pieces = document_pieces(data.open(split, verify=False), table["doc"].to_numpy(), 16)
    for row in table.to_pylist():
        own = pieces[row["doc"]]
        learned = sum(int(piece.predicted.sum()) for piece in own)
        yield ""
        yield f"document {row['doc']}: {row['n_tokens']:,} tokens in {len(own)} pieces, {learned:,} have a loss"
        yield CUT.join(_text(data.tokenizer, piece, in_color=in_color) for piece in own)


def _text(tokenizer: PreTrainedTokenizerBase, piece: Piece, *, in_color: bool) -> str:
    before, after = (GREEN, PLAIN) if in_color else (OPEN, CLOSE)
    parts = []
    for is_trained, some in groupby(zip(piece.predicted.tolist(), piece.ids.tolist(), strict=True), lambda own: own[0]):
        text = printable(str(tokenizer.decode([token for _, token in some], clean_up_tokenization_spaces=False)))
        parts.append(f"{before}{text}{after}" if is_trained else text)
    return "".join(parts)


def printable(text: str) -> str:
    """Return a text without what a terminal would obey, written as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _blocks(data: DataFolder, split: str, count: int) -> Iterator[str]:
    """Yield some blocks, with where each piece of a document lies."""
    stream, shown = data.open(split, verify=False), 0
    for file, rows in stream.shards():
        for row in range(min(rows, count - shown)):
            labels = stream.read_rows(file, np.array([row]))["labels"][0]
            (pieces,) = stream.pieces(file, np.array([row]))
            filled = sum(piece.length for piece in pieces)
            yield ""
            yield (
                f"{split}/{file}, block {row}: {len(pieces)} documents, {filled:,} tokens, "
                f"{int((labels != IGNORED_LABEL).sum()):,} have a loss, {len(labels) - filled:,} padding"
            )
            column = 0
            for piece in pieces:
                own = int((labels[column : column + piece.length] != IGNORED_LABEL).sum())
                yield (
                    f"  {column:>6} to {column + piece.length - 1:>6}: document {piece.doc}, from its token "
                    f"{piece.start}, {own:,} have a loss"
                )
                column += piece.length
            shown += 1
        if shown >= count:
            return
