"""One field of a JSON object whose others need not be readable."""

from __future__ import annotations

import json
import re

from dualtok.errors import DataError

WHITE = re.compile(r"[ \t\r\n]*")
NEXT_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
MOST_DIGITS = 20
PLAIN_VALUE = re.compile(r"[^\s,\]}]+")


def only_field(text: str, field: str, origin: str, group_field: str | None = None) -> dict[str, object]:
    """Return an object's fields by name, those that are not the text's passed over unread.

    For objects with a number or a nesting beyond Python's limits in another field, which :mod:`json` refuses.

    Args:
        text: one line.
        field: the field to read.
        origin: file and line, for the error.
        group_field: another field to read: a text, a number of at most 20 digits, or null.

    Raises:
        DataError: it is no JSON object.
    """
    found: dict[str, object] = {}
    position = after_white(text, 0)
    if text[position : position + 1] != "{":
        raise DataError(f"{origin}: a line must be a JSON object with the field {field!r}")
    decoder = json.JSONDecoder()
    position = after_white(text, position + 1)
    while text[position : position + 1] != "}":
        try:
            key, position = decoder.raw_decode(text, position)
            position = after_white(text, position)
            if not isinstance(key, str) or text[position : position + 1] != ":":
                raise ValueError("no name and value")
            position = after_white(text, position + 1)
            if _is_read(text, position, key, field, group_field):
                found[key], position = decoder.raw_decode(text, position)
            else:
                found[key], position = _Unread(), after_value(text, position)
            position = after_white(text, position)
            if text[position] == ",":
                position = after_white(text, position + 1)
            elif text[position] != "}":
                raise ValueError("no comma")
        except (ValueError, IndexError):
            raise DataError(f"{origin}: not valid JSON at column {position + 1}") from None
    if after_white(text, position + 1) != len(text):
        raise DataError(f"{origin}: not valid JSON: more follows at column {position + 2}")
    return found


def _is_read(text: str, position: int, key: str, field: str, group_field: str | None) -> bool:
    """Return whether a field is one of those to read, and short enough to be read without fear."""
    if key in (field, group_field) and text[position] == '"':
        return True
    plain = PLAIN_VALUE.match(text, position)
    return key == group_field and text[position] not in "[{" and plain is not None and len(plain[0]) <= MOST_DIGITS


class _Unread:
    """A value that was passed over."""


def after_white(text: str, position: int) -> int:
    """Return the place of the first character from ``position`` on that is no white space."""
    match = WHITE.match(text, position)
    assert match is not None
    return match.end()


def after_value(text: str, position: int) -> int:
    """Return the place after the value at ``position``, however deep or long.

    Raises:
        ValueError: there is no value, or it has no end.
    """
    if text[position] not in "[{":
        match = NEXT_BRACKET.match(text, position) or PLAIN_VALUE.match(text, position)
        if match is None:
            raise ValueError("no value")
        return match.end()
    depth = 0
    for match in NEXT_BRACKET.finditer(text, position):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    raise ValueError("no end")
