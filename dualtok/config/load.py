"""Read a run's YAML file strictly.

An unknown key, a value of the wrong type, and a setting without effect in the chosen mode are errors that name the
file, the dotted key and, for a typo, the nearest known key. Names of an earlier version are read with a note.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from dualtok.config.old_names import with_new_names
from dualtok.config.run import RunConfig
from dualtok.errors import ConfigError, did_you_mean, print_to_stderr

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
"""What pydantic calls a key that it does not know."""


class _RunLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice instead of keeping the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_run(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a run's YAML file and apply dotted overrides such as ``train.steps=100``.

    Args:
        path: the YAML file.
        overrides: ``section.key=value``; the value is read as YAML, ``null`` removes a section.

    Raises:
        ConfigError: the file is missing or malformed, or a setting is unknown, of the wrong type or out of range.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a run's YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        tree = yaml.load(text, Loader=_RunLoader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_without_content(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a run is a mapping of sections such as 'data:' and 'train:'")
    return parse_with_overrides(tree, overrides, source=str(path))


def parse_with_overrides(tree: dict[str, Any], overrides: list[str] | tuple[str, ...], source: str) -> RunConfig:
    """Validate a run given as nested dictionaries, after applying dotted overrides.

    Raises:
        ConfigError: a setting is unknown, of the wrong type or out of range.
    """
    tree, notes = _with_new_names(tree, source)
    for override in overrides:
        notes += _apply_override(tree, override)
    _tell(notes, source)
    return parse_run(tree, source=source)


def parse_run(tree: dict[str, Any], source: str = "run") -> RunConfig:
    """Validate a run given as nested dictionaries; ``source`` names it in errors.

    Raises:
        ConfigError: a setting is unknown, of the wrong type or out of range, or there under two names.
    """
    tree, notes = _with_new_names(tree, source)
    _tell(notes, source)
    tree = _with_data_of_texts(tree)
    try:
        return TypeAdapter(RunConfig).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from None


def _with_data_of_texts(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree of an audit of texts with the section ``data`` that it need not have: nothing is prepared."""
    audit = tree.get("audit")
    if tree.get("data") is not None or not isinstance(audit, dict) or not isinstance(audit.get("members"), dict):
        return tree
    return {**tree, "data": {"dir": f"{tree.get('output_dir', RunConfig.output_dir)}/audit/texts"}}


def _with_new_names(tree: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    try:
        return with_new_names(tree)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _tell(notes: list[str], source: str) -> None:
    """Print notes on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        for note in dict.fromkeys(notes):
            print_to_stderr(f"dualtok: {source}: {note}")


def _apply_override(tree: dict[str, Any], override: str) -> list[str]:
    """Put an override into a tree of present names; returns the notes about its own old ones."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {key}: the value is not YAML: {_without_content(error)}") from None
    # The override alone, as a tree: so its old names are replaced whatever the file calls the same sections.
    alone: dict[str, Any] = {}
    node = alone
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    alone, notes = with_new_names(alone)
    path, node = [], alone
    for _ in parents:
        ((name, node),) = node.items()
        path.append(name)
    ((last, value),) = node.items()
    _put(tree, [*path, last], value, override)
    return notes


def _put(tree: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    *parents, last = path
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
        node = child
    node[last] = value


def _without_content(error: yaml.YAMLError) -> str:
    """Return what PyYAML found and where, without the line itself, which may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return "a character that YAML does not allow"
    mark = error.problem_mark
    return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"


def _explain(error: ValidationError) -> str:
    """Turn pydantic's report into one line: all problems, unknown keys first, for one may be why another is missing."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] not in UNKNOWN)
    texts = list(dict.fromkeys(" ".join(_explain_one(problem).split()) for problem in problems))
    return (
        texts[0]
        if len(texts) == 1
        else f"{len(texts)} problems: " + "; ".join(f"({number}) {text}" for number, text in enumerate(texts, start=1))
    )


def _explain_one(problem: ErrorDetails) -> str:
    location = [str(part) for part in problem["loc"] if not str(part).endswith("]")]
    key = ".".join(location)
    if problem["type"] in UNKNOWN:
        return f"unknown key {key!r}{did_you_mean(location[-1], _known_keys(location[:-1]))}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{key}: missing; add it to the run"
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return message if not key or message.startswith(key.split(".")[0]) else f"{key}: {message}"
    secret = key.startswith("data.stream.storage")
    return f"{key}: {problem['msg']}" + ("" if secret else f", got {problem['input']!r}")


def _known_keys(location: list[str]) -> list[str]:
    """Return the field names of the config class at a dotted location."""
    here: Any = RunConfig
    for part in location:
        if part.isdigit():  # an entry of a list, whose class was found with the list
            continue
        here = _config_class(get_type_hints(here).get(part))
        if here is None:
            return []
    return [field.name for field in dataclasses.fields(here)]


def _config_class(annotation: Any) -> Any | None:
    """Return the config class in an annotation such as ``LoraConfig | None`` or ``tuple[MixConfig, ...]``."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    return next(filter(None, map(_config_class, get_args(annotation))), None)
