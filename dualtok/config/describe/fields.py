"""What the classes of a run's settings say: keys, types, defaults, units, and the text below each field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml

from dualtok.config.run import RunConfig

UNITS = {"seconds": "seconds", "gib": "GiB", "mib": "MiB", "tflops": "TFLOP/s", "share": "share, 0 to 1"}
"""Last word of a setting's name -> its unit. Others have theirs in the docstring: ``Unit: blocks.``"""
UNIT = re.compile(r"\s*Unit:\s+([^.]+)\.\s*$")
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key of the YAML."""

    key: str
    hint: Any
    default: str
    doc: str
    unit: str
    section: Any
    """The class of the section that it is; None if it is a value."""

    @property
    def is_number(self) -> bool:
        """Whether its value is made of numbers, which have a unit or none."""
        return self.section is None and bool({int, float} & set(_leaves(self.hint)))


def settings_of(section: Any, prefix: str = "") -> list[Setting]:
    """Return the settings of a section, without those of the sections in it."""
    hints = get_type_hints(section, include_extras=True)
    docs = field_docs(section)
    found = []
    for field in dataclasses.fields(section):
        doc = docs.get(field.name, "")
        stated = UNIT.search(doc)
        unit = " ".join(stated.group(1).split()) if stated else UNITS.get(field.name.rpartition("_")[2], "")
        inner = next((leaf for leaf in _leaves(hints[field.name]) if dataclasses.is_dataclass(leaf)), None)
        found.append(
            Setting(f"{prefix}{field.name}", hints[field.name], _default(field), UNIT.sub("", doc), unit, inner)
        )
    return found


@cache
def all_settings(section: Any = RunConfig, prefix: str = "") -> dict[str, Setting]:
    """Return every setting by its dotted key, sections included."""
    found = {}
    for setting in settings_of(section, prefix):
        found[setting.key] = setting
        if setting.section is not None:
            found |= all_settings(setting.section, f"{setting.key}.")
    return found


def default_line(setting: Setting) -> str:
    """Return what holds where a setting is left out, in words."""
    if setting.section is not None and setting.default == "none":
        return "left out by default"
    return "required" if setting.default == "required" else f"default: {setting.default}"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return in_words(value)


def in_words(value: Any) -> str:
    """Return a setting's value as the reference shows it."""
    if value is None:
        return "none"
    if dataclasses.is_dataclass(value):
        return "its own defaults"
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def _leaves(hint: Any) -> list[Any]:
    """Return the classes and values that a type is made of."""
    if get_origin(hint) is Literal:
        return []
    return [leaf for part in get_args(hint) for leaf in _leaves(part)] or [hint]


def type_of(hint: Any) -> str:
    """Return a type in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is None:
        words = {str: "text", int: "integer", float: "number", bool: "`true` or `false`", Any: "any value"}
        return "section" if dataclasses.is_dataclass(hint) else words[hint]
    if origin is Annotated:
        bounds = [bound for part in parts[1:] for bound in _bounds(part)]
        return " ".join([type_of(parts[0]), ", ".join(bounds)]).strip()
    if origin is Literal:
        *others, last = [f"`{value}`" for value in parts]
        return f"{', '.join(others)} or {last}" if others else last
    if origin is dict:
        return f"mapping of {type_of(parts[0])} to {type_of(parts[1])}"
    if origin in (tuple, list):
        fixed = f"{len(parts)} of " if origin is tuple and parts[-1] is not Ellipsis else ""
        return f"list of {fixed}{type_of(parts[0])}"
    some = [type_of(part) for part in parts if part is not type(None)]
    return ", or ".join([*some, *(["null"] if type(None) in parts else [])])


def _bounds(constraint: Any) -> list[str]:
    found = []
    for part in getattr(constraint, "metadata", [constraint]):
        found += [f"{words} {getattr(part, name)}" for name, words in BOUNDS.items() if hasattr(part, name)]
        if getattr(part, "min_length", None):
            found.append(f"with at least {part.min_length}")
        if getattr(part, "pattern", None):
            found.append(f"like `{part.pattern}`")
    return found


@cache
def field_docs(section: Any) -> dict[str, str]:
    """Return the string below each field of a class."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[ast.unparse(field.target)] = inspect.cleandoc(str(text.value.value))
    return docs


def doc_of(section: Any) -> str:
    """Return the docstring of a class as Markdown."""
    return text_of(inspect.getdoc(section) or "")


def text_of(doc: str) -> str:
    """Return a docstring as Markdown, each paragraph on one line."""
    doc = re.sub(r":\w+:`~?\.?(?:\w+\.)*(\w+)`", r"`\1`", doc.replace("``", "`"))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in doc.split("\n\n"))


def facts_of(setting: Setting) -> str:
    """Return a setting's type, default and unit as one line of Markdown."""
    facts = [type_of(setting.hint), default_line(setting)]
    if setting.is_number:
        facts.append("no unit" if setting.unit == "none" else f"unit: {setting.unit}")
    return " · ".join(facts)
