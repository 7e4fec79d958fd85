"""The settings' reference as text for the terminal, from the same source as the pages of docs/settings/."""

from __future__ import annotations

import shutil
import textwrap

import typer

from dualtok.config.describe.fields import Setting, all_settings, default_line, doc_of, facts_of, settings_of, text_of
from dualtok.config.describe.notes import notes_of
from dualtok.config.run import RunConfig
from dualtok.errors import ConfigError, did_you_mean

INDENT = "  "
MOST_COLUMNS = 100


def reference(name: str | None) -> str:
    """Return the description of a section or of one setting; without a name of the run itself and its sections.

    Args:
        name: such as ``train``, ``train.guard`` or ``train.learning_rate``.

    Raises:
        ConfigError: there is no such setting.
    """
    if name is None:
        return "\n".join(_overview())
    known = all_settings()
    if name not in known:
        raise ConfigError(
            f"no section or setting is called {name!r}{did_you_mean(name, known)}; see `dualtok settings`"
        )
    setting = known[name]
    return "\n".join(_entry(setting) if setting.section is None else _section(setting))


def _overview() -> list[str]:
    top = settings_of(RunConfig)
    lines = [*_wrapped(doc_of(RunConfig), ""), ""]
    for setting in (setting for setting in top if setting.section is None):
        lines += _entry(setting)
    lines += [_heading("sections"), ""]
    width = max(len(setting.key) for setting in top) + 2
    for setting in (setting for setting in top if setting.section is not None):
        lines += _wrapped(text_of(setting.doc), INDENT + setting.key.ljust(width), INDENT + " " * width)
    return [*lines, "", "`dualtok settings SECTION` describes the settings of a section."]


def _section(section: Setting) -> list[str]:
    lines = [_heading(section.key), *_wrapped(f"{default_line(section).capitalize()}.")]
    lines += [*_wrapped(doc_of(section.section)), *_notes(section.key), ""]
    inner = settings_of(section.section, f"{section.key}.")
    for setting in inner:
        lines += _entry(setting)
    for setting in inner:
        if setting.section is not None:
            lines += _section(setting)
    return lines


def _entry(setting: Setting) -> list[str]:
    return [
        _heading(setting.key),
        *_wrapped(facts_of(setting)),
        *_wrapped(text_of(setting.doc)),
        *_notes(setting.key),
        "",
    ]


def _notes(key: str) -> list[str]:
    return [line for note in notes_of(key) for line in _wrapped(note, f"{INDENT}* ", f"{INDENT}  ")]


def _heading(key: str) -> str:
    return typer.style(key, bold=True)


def _wrapped(text: str, first: str = INDENT, others: str = "") -> list[str]:
    """Return paragraphs as lines that fit the terminal."""
    width = min(MOST_COLUMNS, shutil.get_terminal_size().columns)
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        lines += textwrap.wrap(
            paragraph.replace("`` ", "").replace(" ``", ""),
            width,
            initial_indent=first,
            subsequent_indent=others or first,
            break_on_hyphens=False,
            break_long_words=False,
        )
    return lines
