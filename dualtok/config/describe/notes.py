"""What else is known of a setting: where it has an effect, its old names, and the errors that concern it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from functools import cache
from typing import Any

from dualtok.config.describe.fields import all_settings, text_of
from dualtok.config.old_names import KEYS, VALUES, with_new_names
from dualtok.config.reference import USED
from dualtok.config.run import RULES, RunConfig


def notes_of(key: str) -> list[str]:
    """Return a list of Markdown lines about a setting: where it has an effect, its old names, and its errors."""
    notes = []
    first, _, name = key.partition(".")
    if first == "reference" and name and name != "mode":
        modes = [mode for mode, used in USED.items() if name in used]
        if len(modes) < len(USED):
            notes.append(f"Has an effect with `reference.mode`: {', '.join(f'`{mode}`' for mode in modes)}.")
    notes += [text_of(note) + "." for old, note in old_names().items() if _owner(old) == key]
    notes += [f"Refused: `` {error} ``" for error in _errors().get(key, ())]
    return notes


@cache
def old_names() -> dict[str, str]:
    """Return the note that each old name gives, by its dotted key as it is named now."""
    notes = {}
    for old, new in KEYS.items():
        (notes[new],) = with_new_names(_tree(old, None))[1]
    for key, values in VALUES.items():
        for value in values:
            (notes[f"{key}={value}"],) = with_new_names(_tree(key, value))[1]
    return notes


def _tree(key: str, value: str | None) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}  # type: ignore[assignment]
    return value  # type: ignore[return-value]


def _owner(key: str) -> str:
    """Return the setting that a key, or a key and value, belongs to."""
    key = key.partition("=")[0]
    known = all_settings()
    while key and key not in known:
        key = key.rpartition(".")[0]
    return key


@cache
def _errors() -> dict[str, list[str]]:
    """Return the errors of the classes and of the rules between sections, by the setting or section they name."""
    known = all_settings()
    modules = {setting.section.__module__ for setting in known.values() if setting.section} | {RunConfig.__module__}
    found: dict[str, list[str]] = {}
    for module in sorted(modules):
        for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(module)))):
            for message in _messages(node):
                about = re.match(r"[\w.]+", message)
                key = _owner(about.group().rstrip(".")) if about else ""
                if not key and about:  # a class in a section of another name: leave_out.fold of train.leave_out
                    key = next((name for name in known if name.endswith(f".{about.group()}")), "")
                if key:
                    found.setdefault(key, []).append(message)
    assert sum(map(len, found.values())) > len(RULES)
    return found


def _messages(node: ast.AST) -> list[str]:
    """Return the texts of a ``raise ValueError(...)`` or of a ``Rule(...)``."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "ValueError":
        return _texts(node.exc.args[0])
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "Rule" and isinstance(node.args[1], ast.Lambda):
        return _texts(node.args[1].body)
    return []


def _texts(node: ast.expr) -> list[str]:
    if isinstance(node, ast.IfExp):
        return _texts(node.body) + _texts(node.orelse)
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if not isinstance(node, ast.JoinedStr):
        return []
    return ["".join(_placeholder(part) for part in node.values)]


def _placeholder(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    value = part.value
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "did_you_mean":
        return ""
    name = value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else "..."
    return f"<{name}>"
