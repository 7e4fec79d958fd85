"""What one object or row of a source holds: a text or a conversation, and whose it is."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

from dualtok.data.chat.conversations import COLUMNS, conversation_of, holds_conversation
from dualtok.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from dualtok.config.data import DataConfig

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")
WHICH = "say by data.rows: text or data.rows: chat which of them to read"
USUAL_FIELD = "text"
"""Of a text, where ``data.field`` names no other."""


class Document(NamedTuple):
    """A text and where it came from (file and line or row), for errors."""

    text: str
    """Of a conversation what :func:`~dualtok.data.chat.conversations.conversation_of` gives."""
    origin: str
    group: str | None = None
    """Whose it is, by ``data.group_field``; None for nobody's."""
    is_chat: bool = False
    """Whether it is a conversation."""


def document_of(row: dict[str, object], config: DataConfig, origin: str) -> Document:
    """Return the document of one object or row.

    Raises:
        DataError: it has neither a text nor a conversation, or both; or its group is neither a text nor a whole number
            nor missing.
    """
    group = None if config.group_field is None else _group(row.get(config.group_field), config.group_field, origin)
    if _is_conversation(row, config, origin):
        return Document(conversation_of(row, origin, train_on=config.train_on or "assistant"), origin, group, True)
    return Document(text_of(row, config.field, origin), origin, group)


def _is_conversation(row: dict[str, object], config: DataConfig, origin: str) -> bool:
    """Return whether a row is read as a conversation (``data.rows``)."""
    if config.rows == "text" or (config.rows == "auto" and not holds_conversation(row)):
        return False
    if config.rows == "chat" or row.get(config.field) is None:
        return True
    if config.field != USUAL_FIELD:
        return False
    raise DataError(f"{origin}: holds both a field {config.field!r} and a conversation; {WHICH}")


def require_text_rows(config: DataConfig, origin: str) -> None:
    """Refuse a source of texts alone where conversations were asked for.

    Raises:
        DataError: ``data.rows`` is ``chat``.
    """
    if config.rows == "chat":
        raise DataError(f"{origin}: holds a text, no conversation (data.rows: chat); give JSON, CSV or Parquet")


def require_fields(config: DataConfig, known: list[str], origin: str) -> list[str]:
    """Return the columns of a table that are to be read.

    Raises:
        DataError: it lacks one.
    """
    chat = [name for name in COLUMNS if name in known] if config.rows != "text" else []
    if not holds_conversation(dict.fromkeys(chat, True)):
        chat = []
    wanted = {"field": config.field, "group_field": config.group_field}
    columns = {setting: name for setting, name in wanted.items() if name is not None}
    if config.rows == "chat" and not chat:
        raise DataError(f"{origin}: no column 'messages', nor 'prompt' and 'completion' (data.rows: chat)")
    if chat and (config.rows == "chat" or config.field not in known):
        del columns["field"]
    for setting, name in columns.items():
        if name not in known:
            raise DataError(no_field(name, known, origin, setting))
    return list(dict.fromkeys([*columns.values(), *chat]))


def _group(value: object, field: str, origin: str) -> str | None:
    """Return a group's name; an empty text, null and NaN, which tables have for null, are no group."""
    if isinstance(value, float) and not isinstance(value, bool):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value  # whole numbers become such where a table has nulls
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(
            f"{origin}: field {field!r} holds {type(value).__name__}, not the name of a group: a text or a whole "
            "number (data.group_field)"
        )
    return require_text(value, field, origin)


def text_of(row: dict[str, object], field: str, origin: str) -> str:
    """Return an object's text.

    Raises:
        DataError: it has no such field, or one that holds no text.
    """
    if field not in row:
        raise DataError(no_field(field, list(row), origin))
    return require_text(row[field], field, origin)


def require_text(value: object, field: str, origin: str) -> str:
    """Return a text that a file can hold.

    Raises:
        DataError: it is no text, or holds half a character.
    """
    if not isinstance(value, str):
        raise DataError(f"{origin}: field {field!r} holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON's escapes can spell half a character, which no file could hold
        position = f"character {error.start}"
        raise DataError(f"{origin}: field {field!r} holds a lone surrogate at {position}; fix the text") from None
    return value


def reason_of(error: Exception) -> str:
    """Return a library's own words in one short line."""
    return " ".join(str(error).split())[:160]


def no_field(field: str, known: list[str], origin: str, setting: str = "field") -> str:
    """Return the error for a field that is not there."""
    # A JSON object may have texts for keys, which no message must repeat.
    names = [name for name in map(str, known) if NAME.fullmatch(name)]
    others = len(known) - len(names)
    fields = ", ".join([*names, *([f"{others} that are no names"] if others else [])])
    return f"{origin}: no field {field!r}{did_you_mean(field, names)}; fields are {fields} (data.{setting})"
