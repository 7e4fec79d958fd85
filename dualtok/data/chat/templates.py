"""Conversations written with a chat template, and which characters of the result are trained.

A template that has ``{% generation %}`` marks what the assistant says. Of one that has not, each answer is found by
prefixes: what the template writes of the turns before it, with its prompt for an answer, must begin what it writes of
the turns up to the answer's end, and that must begin the whole. The difference is the answer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dualtok.data.tokenizer_check import SpelledOut
from dualtok.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dualtok.data.chat.conversations import Conversation, Message

# Imported where they are used, for what they take to load: transformers (1 to 4 s).

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MOST_OF_A_REASON = 120
Spans = list[tuple[int, int]]
"""Begin and end of stretches of characters, ascending, none empty."""


class ChatTemplateError(DataError):
    """The chat template is missing, or cannot tell what is to be trained."""


class Written(NamedTuple):
    """A conversation as the model reads it."""

    text: str
    trained: Spans


def with_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the template that ``data.chat_template`` names.

    Raises:
        ConfigError: it names neither a file nor one of the tokenizer's templates, or the file is not UTF-8.
    """
    if chat_template is None:
        return tokenizer
    path, own = Path(chat_template), tokenizer.chat_template
    if isinstance(own, dict) and chat_template in own:
        tokenizer.chat_template = own[chat_template]
    elif path.is_file():
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"data.chat_template: {path}: not UTF-8; convert the file to UTF-8") from None
    else:
        names = f"; its templates are {', '.join(sorted(own))}" if isinstance(own, dict) else ""
        raise ConfigError(
            f"data.chat_template: {chat_template}: neither a file nor the name of one of the tokenizer's "
            f"templates{names}"
        )
    return tokenizer


class ChatWriter:
    """Writes conversations with a tokenizer's chat template.

    Args:
        tokenizer: with its template.
        train_on: as ``data.train_on``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: str) -> None:
        self._tokenizer, self._train_on = tokenizer, train_on
        added = [token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
        self._markers = tuple({*SpelledOut(tokenizer).tokens, *(token for token in added if token.strip())})

    def write(self, conversation: Conversation, origin: str) -> Written:
        """Return a conversation as text, with the characters that are trained.

        Args:
            conversation: with an answer, unless all is trained.
            origin: where it comes from, for errors.

        Raises:
            ChatTemplateError: there is no template, it fails, or it does not tell which characters an answer is.
        """
        template = self._template(conversation, origin)
        text, marked = _render(self._tokenizer, template, conversation, conversation.messages, origin)
        if self._train_on == "all":
            return Written(text, [(0, len(text))])
        if not GENERATION.search(template):
            return Written(text, self._found_by_prefixes(template, conversation, text, origin))
        if conversation.prompt:
            before = conversation.messages[: conversation.prompt]
            marked = marked[len(_render(self._tokenizer, template, conversation, before, origin)[1]) :]
        if not marked:
            raise ChatTemplateError(
                f"{origin}: the chat template marks nothing of this conversation's answers by {{% generation %}}, so "
                "that nothing would be trained; correct the template (data.chat_template)"
            )
        return Written(text, marked[-1:] if self._train_on == "last" else marked)

    def _template(self, conversation: Conversation, origin: str) -> str:
        if self._tokenizer.chat_template is None:
            raise ChatTemplateError(
                f"{origin}: a conversation, but the tokenizer has no chat template; give one in data.chat_template (a "
                "Jinja file), or in data.tokenizer the tokenizer of a chat model"
            )
        try:
            template: str = self._tokenizer.get_chat_template(None, conversation.tools)
        except ValueError:
            raise ChatTemplateError(
                f"{origin}: the tokenizer has several chat templates and none called 'default'; name one of "
                f"{', '.join(sorted(self._tokenizer.chat_template))} in data.chat_template"
            ) from None
        return template

    def _found_by_prefixes(self, template: str, conversation: Conversation, text: str, origin: str) -> Spans:
        wanted = conversation.answers[-1:] if self._train_on == "last" else conversation.answers
        spans: Spans = []
        for number in wanted:
            until = conversation.messages[: number + 1]
            before, _ = _render(self._tokenizer, template, conversation, until[:-1], origin, prompt=True)
            after = text
            if len(until) < len(conversation.messages):
                after, _ = _render(self._tokenizer, template, conversation, until, origin)
            if not (text.startswith(after) and after.startswith(before)):
                last = "" if self._train_on == "last" else ", or train on the last answer alone (data.train_on: last)"
                raise ChatTemplateError(
                    f"{origin}: the chat template writes the turns before message {number} otherwise without what "
                    "follows them, so that this answer's tokens cannot be told; give a template that marks answers by "
                    f"{{% generation %}} (data.chat_template){last}"
                )
            end = len(before) + self._trained_length(after[len(before) :])
            if end > len(before):
                spans.append((len(before), end))
        if not spans:
            raise ChatTemplateError(
                f"{origin}: the chat template writes nothing of this conversation's answers, so that nothing would be "
                "trained; give another template (data.chat_template)"
            )
        return spans

    def _trained_length(self, answer: str) -> int:
        """Return how much of a turn is trained: all, without white space after the token that ends it."""
        stripped = answer.rstrip()
        return len(stripped) if stripped.endswith(self._markers) else len(answer)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    conversation: Conversation,
    messages: list[Message],
    origin: str,
    *,
    prompt: bool = False,
) -> tuple[str, Spans]:
    """Return what a template makes of some messages, and the characters that it marks by ``{% generation %}``."""
    from transformers.utils.chat_template_utils import render_jinja_template

    given: dict[str, Any] = dict(tokenizer.special_tokens_map)
    marks = GENERATION.search(template) is not None
    render: Any = render_jinja_template  # the library annotates neither its tools nor what it returns
    try:
        texts, spans = render(
            conversations=[messages],
            tools=conversation.tools,
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=prompt,
            **given,
        )
    except Exception as error:  # whatever Jinja, the template's own checks and its operations raise
        reason = " ".join(str(error).split())[:MOST_OF_A_REASON]
        raise ChatTemplateError(
            f"{origin}: the chat template fails on this conversation: {type(error).__name__}: {reason}; correct the "
            "row, or give another template (data.chat_template)"
        ) from None
    return texts[0], [(start, end) for start, end in spans[0] if start < end] if marks else []
