"""Conversations as rows give them, and the one text that stands for a conversation while data is prepared.

Errors name the row and never repeat what was said in it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from dualtok.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

COLUMNS = ("messages", "tools", "prompt", "completion")
"""Keys or columns that a conversation is read from."""
ASSISTANT, INSTRUCTIONS = "assistant", ("system", "developer")
"""Role whose turns are trained, and roles whose turns many conversations have in common."""
Message = dict[str, Any]


class Conversation(NamedTuple):
    """Messages in their order, and the tools that the assistant could call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    prompt: int = 0
    """How many messages, from the first, are the prompt: their assistant's turns are not trained."""

    @property
    def answers(self) -> list[int]:
        """The messages that are assistant's turns, without those of the prompt."""
        every = enumerate(self.messages)
        return [number for number, message in every if number >= self.prompt and message["role"] == ASSISTANT]


class Pair(NamedTuple):
    """A prompt and its completion, written one after the other without a template."""

    prompt: str
    completion: str


def holds_conversation(row: Mapping[str, object]) -> bool:
    """Return whether a row has the fields of a conversation."""
    return row.get("messages") is not None or (row.get("prompt") is not None and row.get("completion") is not None)


def conversation_of(row: Mapping[str, object], origin: str, *, train_on: str) -> str:
    """Return a row's conversation as JSON, the same for the same conversation; :func:`parse` reads it.

    Args:
        row: with ``messages`` and perhaps ``tools``, or ``prompt`` and ``completion``, two texts or two lists of
            messages.
        origin: where it is, for errors.
        train_on: as ``data.train_on``.

    Raises:
        DataError: it is no conversation, or ``train_on`` leaves nothing of it to train on.
    """
    if not holds_conversation(row):
        raise DataError(f"{origin}: neither 'messages' nor both 'prompt' and 'completion' (data.rows: chat)")
    prompt, completion = row.get("prompt"), row.get("completion")
    given: dict[str, Any]
    if row.get("messages") is not None:
        if completion is not None:
            raise DataError(f"{origin}: has 'messages' as well as 'completion'; leave one of them out")
        given = {"messages": _messages(row["messages"], "messages", origin)}
    elif isinstance(prompt, str) and isinstance(completion, str):
        return _as_json({"prompt": prompt, "completion": completion}, origin)
    else:
        before = _messages(prompt, "prompt", origin)
        given = {"messages": [*before, *_messages(completion, "completion", origin)], "prompt": len(before)}
    tools = _tools(row.get("tools"), origin)
    if tools:
        given["tools"] = tools
    if train_on != "all" and not Conversation(given["messages"], prompt=given.get("prompt", 0)).answers:
        where = "the completion has" if "prompt" in given else "has"
        raise DataError(
            f"{origin}: {where} no message of the role {ASSISTANT!r}, so that nothing of it would be trained; leave "
            "the row out, or train on all tokens (data.train_on: all)"
        )
    return _as_json(given, origin)


def parse(text: str) -> Conversation | Pair:
    """Return the conversation that :func:`conversation_of` wrote."""
    given = json.loads(text)
    if "completion" in given:
        return Pair(**given)
    return Conversation(**given)


def plain_text(text: str) -> str:
    """Return what was said in a conversation, which duplicates are told by.

    Without instructions and tools: many conversations share them, and would count as near duplicates for it.

    Args:
        text: of :func:`conversation_of`.
    """
    conversation = parse(text)
    if isinstance(conversation, Pair):
        return f"{conversation.prompt}\n{conversation.completion}"
    return "\n".join(part for message in conversation.messages for part in _said(message))


def _said(message: Message) -> Iterator[str]:
    if message["role"] in INSTRUCTIONS:
        return
    for key in ("reasoning_content", "content"):
        content = message.get(key)
        if isinstance(content, str):
            yield content
        elif content is not None:
            yield from (part["text"] for part in content)
    if message.get("tool_calls"):
        yield json.dumps(message["tool_calls"], ensure_ascii=False)


def _messages(value: object, field: str, origin: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else type(value).__name__
        raise DataError(f"{origin}: field {field!r} holds {what}, not a list of messages (role, content)")
    return [_message(message, f"{origin}: {field}[{number}]") for number, message in enumerate(value)]


def _message(value: object, origin: str) -> Message:
    """Return a message without the keys that hold null, as ``apply_chat_template`` reads it."""
    if not isinstance(value, dict):
        raise DataError(f"{origin}: holds {type(value).__name__}, not a message (role, content)")
    message = {str(key): content for key, content in value.items() if content is not None}
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise DataError(f"{origin}: has no role; give role and content, as the Hugging Face and OpenAI formats do")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise DataError(f"{origin}: has neither content nor tool_calls")
    if not isinstance(content, str | None) and not _are_texts(content):
        raise DataError(
            f"{origin}: content is neither a text nor a list of parts of the type 'text'; others are not read"
        )
    if "weight" in message and message["weight"] != 1:
        raise DataError(f"{origin}: a weight of a message is not read; leave it out (data.train_on: last may do)")
    return message


def _are_texts(content: object) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    )


def _tools(value: object, origin: str) -> list[dict[str, Any]] | None:
    """Return the tools, given as a list or as the JSON of one, which tables need: they give each object all keys."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{origin}: field 'tools' holds a text that is not JSON") from None
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{origin}: field 'tools' holds {type(value).__name__}, not a list of JSON objects")
    return value


def _as_json(given: dict[str, Any], origin: str) -> str:
    try:
        text = json.dumps(given, ensure_ascii=False, separators=(",", ":"))
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{origin}: the conversation holds a lone surrogate; fix the text") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{origin}: the conversation holds what JSON cannot ({type(error).__name__})") from None
    return text
