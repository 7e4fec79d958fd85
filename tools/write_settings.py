"""Write ``docs/settings/``: one page per section of a run's YAML, from the classes that read it.

python tools/write_settings.py
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml

from dualtok.config.old_names import KEYS, VALUES, with_new_names
from dualtok.config.reference import USED
from dualtok.config.run import RULES, RunConfig

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "settings"
GUIDES = {
    "data": "[Preparing data](../data.md)",
    "model": "[Training](../training.md)",
    "train": "[Training](../training.md), [Layouts](../layouts.md), [Checkpoints and faults](../checkpoints.md)",
    "selection": "[The method](../method.md)",
    "goldfish": "[The method](../method.md)",
    "privacy": "[DP-SGD](../dp_sgd.md)",
    "interpolate": "[dual_plus](../dual_plus.md)",
    "reference": "[The reference](../reference.md)",
    "audit": "[The audit](../audit.md)",
    "monitor": "[Monitoring](../monitoring.md)",
    "launch": "[Several hosts](../launch/index.md)",
}
"""Section -> the pages that explain it."""
UNITS = {"seconds": "seconds", "gib": "GiB", "mib": "MiB", "tflops": "TFLOP/s", "share": "share, 0 to 1"}
"""Last word of a setting's name -> its unit. Others have theirs in the docstring: ``Unit: blocks.``"""
UNIT = re.compile(r"\s*Unit:\s+([^.]+)\.\s*$")
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
INDEX = """\
# Settings

A run is one YAML file. These pages are written by `tools/write_settings.py` from the classes that read it.

```yaml
output_dir: runs/dual     # settings of the run itself
data:                     # a section
  dir: data
train:
  learning_rate: 1.0e-4
  guard: {on_nan: skip}   # a section of a section
```

On the command line `train.guard.on_nan=skip` replaces a setting of the file, and `selection=null` removes a section. An
unknown key, a value of the wrong type and a setting that has no effect in the chosen mode are errors, and nothing is
started. The errors that concern a setting stand below it, with `<...>` in the place of what differs from run to run.

A default that was taken from a paper or from another library says so. All others are dualtok's own choice.
"""
NAMES = """\
## Names used before 0.2

They are read with a note on standard error. A setting that is there under both names is an error.
"""


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


def pages() -> dict[str, str]:
    """Return the name and text of every page."""
    top = settings_of(RunConfig)
    sections = [setting for setting in top if setting.section is not None]
    index = [INDEX, "| section | what it holds |", "|---|---|", "| [the run itself](run.md) | what every verb needs |"]
    index += [f"| [`{setting.key}`]({setting.key}.md) | {text_of(setting.doc)} |" for setting in sections]
    index += ["", NAMES, *(f"* {note}" for note in map(text_of, _old_names().values()))]
    run = ["# The run itself", "", doc_of(RunConfig), ""]
    run += [line for setting in top if setting.section is None for line in _entry(setting, 2)]
    written = {"index.md": index, "run.md": run}
    for setting in sections:
        guide = f"Explained in: {GUIDES[setting.key]}."
        written[f"{setting.key}.md"] = [f"# {setting.key}", "", *_section(setting, 1), guide, "", *_inside(setting, 2)]
    return {name: "\n".join(lines).rstrip() + "\n" for name, lines in written.items()}


def _inside(section: Setting, level: int) -> list[str]:
    """Return the entries of a section: its values, then the sections in it with theirs."""
    inner = settings_of(section.section, f"{section.key}.")
    lines = [line for setting in inner for line in _entry(setting, level)]
    for setting in inner:
        if setting.section is not None:
            lines += [f"{'#' * level} The section `{setting.key}`", "", *_section(setting, level)]
            lines += _inside(setting, level + 1)
    return lines


def _section(section: Setting, level: int) -> list[str]:
    lines = [doc_of(section.section), ""]
    return lines if level > 1 else [*lines, f"{_default_line(section).capitalize()}.", "", *_notes(section.key)]


def _entry(setting: Setting, level: int) -> list[str]:
    facts = [_type_of(setting.hint), _default_line(setting)]
    if setting.is_number:
        facts.append("no unit" if setting.unit == "none" else f"unit: {setting.unit}")
    heading = f"{'#' * level} `{setting.key}` {{ #{setting.key} }}"
    return [heading, "", " · ".join(facts), "", text_of(setting.doc), "", *_notes(setting.key)]


def _notes(key: str) -> list[str]:
    """Return what else is known of a setting: where it has an effect, its old names, and its errors."""
    notes = []
    first, _, name = key.partition(".")
    if first == "reference" and name and name != "mode":
        modes = [mode for mode, used in USED.items() if name in used]
        if len(modes) < len(USED):
            notes.append(f"Has an effect with `reference.mode`: {', '.join(f'`{mode}`' for mode in modes)}.")
    notes += [text_of(note) + "." for old, note in _old_names().items() if _owner(old) == key]
    notes += [f"Refused: `` {error} ``" for error in _errors().get(key, ())]
    return [*(f"* {note}" for note in notes), ""] if notes else []


def _default_line(setting: Setting) -> str:
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


def _type_of(hint: Any) -> str:
    """Return a type in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is None:
        words = {str: "text", int: "integer", float: "number", bool: "`true` or `false`", Any: "any value"}
        return "section" if dataclasses.is_dataclass(hint) else words[hint]
    if origin is Annotated:
        bounds = [bound for part in parts[1:] for bound in _bounds(part)]
        return " ".join([_type_of(parts[0]), ", ".join(bounds)]).strip()
    if origin is Literal:
        *others, last = [f"`{value}`" for value in parts]
        return f"{', '.join(others)} or {last}" if others else last
    if origin is dict:
        return f"mapping of {_type_of(parts[0])} to {_type_of(parts[1])}"
    if origin in (tuple, list):
        fixed = f"{len(parts)} of " if origin is tuple and parts[-1] is not Ellipsis else ""
        return f"list of {fixed}{_type_of(parts[0])}"
    some = [_type_of(part) for part in parts if part is not type(None)]
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
def _old_names() -> dict[str, str]:
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


def main() -> None:
    """Write every page, and remove those of sections that are gone."""
    FOLDER.mkdir(exist_ok=True)
    written = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in written:
            path.unlink()
    for name, text in written.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
