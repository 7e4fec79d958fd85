"""Texts and conversations to token ids, and which of them are trained.

A token is trained if it holds a trained character, so that one which holds both the end of a prompt and the beginning
of the answer is trained too.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dualtok.data.chat.conversations import Pair, parse
from dualtok.data.chat.special import encode_spelled_out
from dualtok.data.chat.templates import ChatTemplateError, ChatWriter
from dualtok.data.chat.tokens import trained_tokens
from dualtok.data.tokenizer import beginning, encode
from dualtok.data.tokenizer_check import SpelledOut

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from dualtok.data.chat.templates import Spans

ENCODED_AT_ONCE = 1 << 18
"""Characters whose token ids are in memory as Python's integers at one time."""


class Encoded(NamedTuple):
    """A document's tokens, and what its table says of it."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    """Whether each token is trained."""
    n_characters: int
    """Of the document as the model reads it."""
    zlib_bytes: int
    """Compressed size of what is trained."""


class DocumentEncoder:
    """Encodes texts and conversations with one tokenizer.

    Args:
        tokenizer: with an end token; with a chat template, where there are lists of messages.
        train_on: as ``data.train_on``.
        special: whether special tokens that a document spells out become these tokens, and not pieces like other text.
        end: whether the end token closes a text; conversations end as their template ends them.

    Raises:
        ChatTemplateError: the tokenizer does not tell which characters a token holds.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train_on: str = "assistant",
        special: bool = False,
        end: bool = True,
    ) -> None:
        self._tokenizer, self._train_on, self._special, self._end = tokenizer, train_on, special, end
        self._writer = ChatWriter(tokenizer, train_on)
        self._spelled = SpelledOut(tokenizer)

    def encode(self, texts: Sequence[str], origins: Sequence[str | None]) -> list[Encoded]:
        """Return the tokens of documents.

        Args:
            texts: texts, and conversations as :func:`~.conversations.conversation_of` gives them.
            origins: where each conversation comes from; None for a text.

        Raises:
            ChatTemplateError: the template is missing or does not tell what is trained, or nothing is.
        """
        found: dict[int, Encoded] = {}
        plain = [number for number, origin in enumerate(origins) if origin is None]
        for some in _portions(plain, texts):
            rows = encode(self._tokenizer, [texts[number] for number in some], special=self._special, end=self._end)
            found |= {number: _of_text(texts[number], ids) for number, ids in zip(some, rows, strict=True)}
        chats = [number for number, origin in enumerate(origins) if origin is not None]
        for some in _portions(chats, texts):
            found |= self._conversations({number: (texts[number], str(origins[number])) for number in some})
        return [found[number] for number in range(len(texts))]

    def _conversations(self, given: dict[int, tuple[str, str]]) -> dict[int, Encoded]:
        """Return the tokens of some conversations, by the numbers of (text, origin)."""
        if not self._tokenizer.is_fast:
            raise ChatTemplateError(
                "data.tokenizer: does not tell which characters a token holds, which conversations need; save it as a "
                "fast tokenizer (tokenizer.json)"
            )
        found: dict[int, Encoded] = {}
        written: dict[int, tuple[str, Spans]] = {}
        pairs: dict[int, tuple[str, Spans]] = {}
        for number, (text, origin) in given.items():
            conversation = parse(text)
            if isinstance(conversation, Pair):
                together = conversation.prompt + conversation.completion
                begin = 0 if self._train_on == "all" else len(conversation.prompt)
                pairs[number] = together, [(begin, len(together))]
            elif not self._special and self._spelled.in_text(text):
                found[number] = self._with_spelled_out(text, origin)
            else:
                written[number] = self._writer.write(conversation, origin)
        found |= self._tokens(written, special=True, ended=False)
        found |= self._tokens(pairs, special=self._special, ended=True)
        return found

    def _tokens(self, written: dict[int, tuple[str, Spans]], *, special: bool, ended: bool) -> dict[int, Encoded]:
        if not written:
            return {}
        texts = [text for text, _ in written.values()]
        output: Any = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
            split_special_tokens=not special,
        )
        head = beginning(self._tokenizer) if ended else []
        tail = [self._tokenizer.eos_token_id] if ended and self._end else []
        found = {}
        rows = zip(written.items(), output["input_ids"], output.encodings, strict=True)
        for (number, (text, spans)), ids, encoding in rows:
            trained = [
                np.full(len(head), self._train_on == "all"),
                trained_tokens(encoding, spans),
                np.ones(len(tail), dtype=np.bool_),
            ]
            found[number] = Encoded(
                np.array([*head, *ids, *tail], dtype=np.int32), np.concatenate(trained), len(text), _size(text, spans)
            )
        return found

    def _with_spelled_out(self, content: str, origin: str) -> Encoded:
        text, spans, ids, trained = encode_spelled_out(self._tokenizer, self._writer, self._spelled, content, origin)
        return Encoded(ids, trained, len(text), _size(text, spans))


def learned(trained: NDArray[np.bool_], block_length: int) -> NDArray[np.bool_]:
    """Return which tokens of a document have a loss: those trained that are not the first of a piece."""
    own = trained.copy()
    own[::block_length] = False
    return own


def _of_text(text: str, ids: list[int]) -> Encoded:
    return Encoded(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=np.bool_), len(text), _size(text))


def _size(text: str, spans: Spans | None = None) -> int:
    """Return the compressed size of a text, or of what is trained of it."""
    trained = text if spans is None else "".join(text[start:end] for start, end in spans)
    return len(zlib.compress(trained.encode("utf-8", "surrogatepass")))


def _portions(numbers: list[int], texts: Sequence[str]) -> Iterator[list[int]]:
    """Cut some documents into portions of bounded characters."""
    portion: list[int] = []
    characters = 0
    for number in numbers:
        portion.append(number)
        characters += len(texts[number])
        if characters >= ENCODED_AT_ONCE:
            yield portion
            portion, characters = [], 0
    if portion:
        yield portion
