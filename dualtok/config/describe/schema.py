"""The JSON schema of a run's YAML file, for editors: what a key means, which values it takes, and its default."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from dualtok.config.describe.fields import Setting, doc_of, settings_of, text_of
from dualtok.config.run import RunConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

IDENTITY = "urn:dualtok:run:1"
OF_TEXTS = {"required": ["members"], "properties": {"members": {"type": "object"}}}
DATA_OR_TEXTS = [{"required": ["data"]}, {"required": ["audit"], "properties": {"audit": OF_TEXTS}}]
"""An audit of texts prepares nothing, and needs no section ``data``."""


def run_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a run file, with the docstring and unit of every setting.

    It knows the present names alone, and nothing of the rules between settings: these are checked when the file is
    loaded.
    """
    schema = TypeAdapter(RunConfig).json_schema()
    records = schema.pop("$defs")
    for section in (RunConfig, *_sections(RunConfig)):
        _describe(schema if section is RunConfig else records[section.__name__], section)
    schema["required"] = [name for name in schema["required"] if name != "data"]
    if not schema["required"]:
        del schema["required"]
    head = {"$schema": GenerateJsonSchema.schema_dialect, "$id": IDENTITY, "title": "A run of dualtok"}
    return {**head, **schema, "anyOf": DATA_OR_TEXTS, "$defs": records}


def _sections(section: Any) -> Iterator[Any]:
    """Yield the class of every section in a section."""
    for setting in settings_of(section):
        if setting.section is not None:
            yield setting.section
            yield from _sections(setting.section)


def _describe(record: dict[str, Any], section: Any) -> None:
    """Put docstrings into the schema of a section, in place of titles that repeat the names."""
    record.pop("title", None)
    record["description"] = doc_of(section)
    for setting in settings_of(section):
        field = record["properties"][setting.key]
        field.pop("title", None)
        field["description"] = _description(setting)


def _description(setting: Setting) -> str:
    unit = f" Unit: {setting.unit}." if setting.is_number and setting.unit != "none" else ""
    return text_of(setting.doc) + unit
