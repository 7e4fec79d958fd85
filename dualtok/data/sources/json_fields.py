"""One field of a JSON object whose others need not be readable."""

from __future__ import annotations

import json
import re

from dualtok.errors import DataError

WHITE = re.compile(r"[ \t\r\n]*")
NEXT_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
PLAIN_VALUE = re.compile(r"[^\s,\]}]+")


def only_field(text: str, field: str, origin: str) -> dict[str, object]:
    """Return an object's fields by name, those that are not the text's passed over unread.

    For objects with a number or a nesting beyond Python's limits in another field, which :mod:`json` refuses.

    Args:
        text: one line.
        field: the field to read.
        origin: file and line, for the error.

    Raises:
        DataError: it is no JSON object.
    """
    found: dict[str, object] = {}
    place = after_white(text, 0)
    if text[place : place + 1] != "{":
        raise DataError(f"{origin}: a line must be a JSON object with the field {field!r}")
    decoder = json.JSONDecoder()
    place = after_white(text, place + 1)
    while text[place : place + 1] != "}":
        try:
            key, place = decoder.raw_decode(text, place)
            place = after_white(text, place)
            if not isinstance(key, str) or text[place : place + 1] != ":":
                raise ValueError("no name and value")
            place = after_white(text, place + 1)
            if key == field and text[place] == '"':
                found[key], place = decoder.raw_decode(text, place)
            else:
                found[key], place = _Unread(), after_value(text, place)
            place = after_white(text, place)
            if text[place] == ",":
                place = after_white(text, place + 1)
            elif text[place] != "}":
                raise ValueError("no comma")
        except (ValueError, IndexError):
            raise DataError(f"{origin}: not valid JSON at column {place + 1}") from None
    if after_white(text, place + 1) != len(text):
        raise DataError(f"{origin}: not valid JSON: more follows at column {place + 2}")
    return found


class _Unread:
    """A value that was passed over."""


def after_white(text: str, place: int) -> int:
    """Return the place of the first character from ``place`` on that is no white space."""
    match = WHITE.match(text, place)
    assert match is not None
    return match.end()


def after_value(text: str, place: int) -> int:
    """Return the place after the value at ``place``, however deep or long.

    Raises:
        ValueError: there is no value, or it has no end.
    """
    if text[place] not in "[{":
        match = NEXT_BRACKET.match(text, place) or PLAIN_VALUE.match(text, place)
        if match is None:
            raise ValueError("no value")
        return match.end()
    depth = 0
    for match in NEXT_BRACKET.finditer(text, place):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    raise ValueError("no end")
