"""From trained characters to trained tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from dualtok.data.chat.templates import Spans


def trained_tokens(encoding: Any, spans: Spans) -> NDArray[np.bool_]:
    """Return which tokens hold a trained character.

    Args:
        encoding: of the library ``tokenizers``, which tells the characters of each token.
        spans: trained characters.
    """
    count = len(encoding.ids)
    trained = np.zeros(count, dtype=np.bool_)
    for start, end in spans:
        # A tokenizer may drop white space at the begin or the end, which is then in no token.
        first = _first_token(encoding, range(start, end))
        last = _first_token(encoding, range(end - 1, start - 1, -1))
        if first is None or last is None:
            continue
        # A character may be in several tokens, as bytes, and is found in the first of them.
        while last + 1 < count and _begins_before(encoding.token_to_chars(last + 1), end):
            last += 1
        trained[first : last + 1] = True
    return trained


def _first_token(encoding: Any, characters: Iterable[int]) -> int | None:
    return next((token for at in characters if (token := encoding.char_to_token(at)) is not None), None)


def _begins_before(characters: tuple[int, int] | None, end: int) -> bool:
    return characters is not None and characters[0] < end and characters[1] > characters[0]
