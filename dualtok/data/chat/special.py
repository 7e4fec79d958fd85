"""Conversations in which a message spells out a special token, which must not become that token.

A message that could write ``<|im_end|>`` could end its own turn and speak for the assistant. A mark is put into each
such text before the template is applied, so that the special tokens that are left are the template's own; what lies
between these is then encoded as text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dualtok.data.chat.conversations import Conversation, parse
from dualtok.data.chat.templates import ChatTemplateError
from dualtok.data.chat.tokens import trained_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from dualtok.data.chat.templates import ChatWriter, Spans
    from dualtok.data.tokenizer_check import SpelledOut

MARKS = tuple(map(chr, range(0xF0000, 0xF0010)))
"""Characters that no text should hold: of a private plane."""


class Tokens(NamedTuple):
    """A conversation's text, its trained characters, and both as tokens."""

    text: str
    spans: Spans
    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


def encode_spelled_out(
    tokenizer: PreTrainedTokenizerBase, writer: ChatWriter, spelled: SpelledOut, content: str, origin: str
) -> Tokens:
    """Return the tokens of a conversation, with what its messages spell out as ordinary pieces.

    Args:
        tokenizer: with a chat template.
        writer: that applies it.
        spelled: finds special tokens.
        content: the conversation, as :func:`~.conversations.conversation_of` gives it.
        origin: where it comes from, for errors.

    Raises:
        ChatTemplateError: the tokenizer encodes text between special tokens otherwise than by itself, so that this
            cannot be done; or as :meth:`.templates.ChatWriter.write`.
    """
    conversation = parse(content)
    assert isinstance(conversation, Conversation)
    mark = next((mark for mark in MARKS if mark not in content), None)
    if mark is None:
        raise ChatTemplateError(f"{origin}: holds all characters of a private plane that could mark special tokens")
    marked = conversation._replace(
        messages=_marked(conversation.messages, spelled, mark), tools=_marked(conversation.tools, spelled, mark)
    )
    written = writer.write(marked, origin)
    text = written.text.replace(mark, "")
    whole: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if _joined(tokenizer, text, spelled, "", [])[0] != whole:
        raise ChatTemplateError(
            f"{origin}: a message spells out a special token, and this tokenizer encodes text around special tokens "
            "otherwise than by itself; take it out, or let it become that token (data.special_tokens_in_text: encode)"
        )
    ids, trained = _joined(tokenizer, written.text, spelled, mark, written.trained)
    spans = [
        (_unmarked(written.text, start, mark), _unmarked(written.text, end, mark)) for start, end in written.trained
    ]
    return Tokens(text, spans, np.array(ids, dtype=np.int32), np.array(trained, dtype=np.bool_))


def _marked(value: Any, spelled: SpelledOut, mark: str) -> Any:
    """Return a value with a mark after the first character of each special token in its texts."""
    if isinstance(value, str):
        return spelled.replace(value, lambda token: token[:1] + mark + token[1:])
    if isinstance(value, dict):
        return {key: _marked(item, spelled, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [_marked(item, spelled, mark) for item in value]
    return value


def _joined(
    tokenizer: PreTrainedTokenizerBase, text: str, spelled: SpelledOut, mark: str, spans: Spans
) -> tuple[list[int], list[bool]]:
    """Return ids, and which are trained, of a text cut at its special tokens; what is between them is text."""
    ids: list[int] = []
    trained: list[bool] = []
    position = 0
    for start, end in [*spelled.places(text), (len(text), len(text))]:
        part = text[position:start]
        plain = part.replace(mark, "") if mark else part
        if plain:
            encoding: Any = tokenizer(plain, add_special_tokens=False, verbose=False, split_special_tokens=True)
            inside = [
                (
                    _unmarked(part, max(first, position) - position, mark),
                    _unmarked(part, min(last, start) - position, mark),
                )
                for first, last in spans
                if first < start and last > position
            ]
            ids += encoding["input_ids"]
            trained += trained_tokens(encoding.encodings[0], inside).tolist()
        if start < end:
            token = tokenizer.convert_tokens_to_ids(text[start:end])
            assert isinstance(token, int)
            ids.append(token)
            trained.append(any(first < end and last > start for first, last in spans))
        position = end
    return ids, trained


def _unmarked(text: str, position: int, mark: str) -> int:
    """Return the place of a character after the marks are taken out."""
    return position - (text.count(mark, 0, position) if mark else 0)
