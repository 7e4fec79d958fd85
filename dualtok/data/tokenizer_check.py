"""What a tokenizer does to texts that a reader would not expect: special tokens spelled out, and what is lost."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from transformers import PreTrainedTokenizerBase

SAMPLED_DOCUMENTS = 256
SAMPLED_CHARACTERS = 1 << 20
MOST_LOST = 0.01
"""Share of documents that lose something above which ``prepare`` warns."""
UNKNOWN, VANISHED, WHITE_SPACE, CHANGED = "unknown pieces", "vanished characters", "white space", "changed characters"


class SpelledOut:
    """Finds texts that spell out a special token of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        self.tokens = sorted(filter(None, special), key=lambda token: (-len(token), token))
        # Of hundreds of reserved tokens most begin alike: few searches tell that there is none.
        self._beginnings = sorted({token[:2] for token in self.tokens})
        self._pattern = re.compile("|".join(map(re.escape, self.tokens))) if self.tokens else None

    def in_text(self, text: str) -> bool:
        """Return whether a text holds one."""
        if self._pattern is None or not any(beginning in text for beginning in self._beginnings):
            return False
        return self._pattern.search(text) is not None

    def places(self, text: str) -> list[tuple[int, int]]:
        """Return begin and end of each one in a text; of several that begin at a place the longest."""
        return [] if self._pattern is None else [match.span() for match in self._pattern.finditer(text)]

    def replace(self, text: str, change: Callable[[str], str]) -> str:
        """Return a text with each one in it changed."""
        return text if self._pattern is None else self._pattern.sub(lambda match: change(match[0]), text)

    def count(self, texts: Iterable[str]) -> int:
        """Return how many texts hold one."""
        return sum(map(self.in_text, texts))


def sample(texts: Iterable[str]) -> list[str]:
    """Return the first texts, bounded in number and in characters."""
    taken: list[str] = []
    characters = 0
    for text in texts:
        if len(taken) == SAMPLED_DOCUMENTS or characters >= SAMPLED_CHARACTERS:
            break
        taken.append(text)
        characters += len(text)
    return taken


def lost(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Counter[str]:
    """Return how many texts come back from their token ids with a kind of loss; each counts once in ``total()``.

    A space in front, which many tokenizers add, is no loss. Of several kinds the first of these counts: unknown pieces,
    characters that vanished, white space alone, other changes.
    """
    found: Counter[str] = Counter()
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=True)["input_ids"]
        again = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False, skip_special_tokens=False))
        if text in (again, again.removeprefix(" ")):
            continue
        before, after = ("".join(one.split()) for one in (text, again))
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            found[UNKNOWN] += 1
        elif before == after:
            found[WHITE_SPACE] += 1
        elif Counter(before) > Counter(after):
            found[VANISHED] += 1
        else:
            found[CHANGED] += 1
    return found
