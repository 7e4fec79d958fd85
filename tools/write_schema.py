"""Write ``docs/schema/``: the JSON schema of ``report.json``, from the records that it is written from.

python tools/write_schema.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import GenerateJsonSchema

from dualtok.audit import settings
from dualtok.audit.report import base, data, details
from dualtok.audit.report.data import REPORT_FORMAT, AuditReport
from dualtok.audit.signals import reruns
from dualtok.config.describe.fields import doc_of, field_docs, text_of

if TYPE_CHECKING:
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core.core_schema import FloatSchema

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "schema"
FILE = FOLDER / f"{REPORT_FORMAT.replace('/', '-').removeprefix('dualtok-')}.schema.json"
NOT_NUMBERS = ["Infinity", "-Infinity", "NaN"]
"""What JSON has no number for, as the records write it."""


class _Written(GenerateJsonSchema):
    """The schema of what is written, in which a number without bounds may be infinite, or none."""

    def float_schema(self, schema: FloatSchema) -> JsonSchemaValue:
        number = super().float_schema(schema)
        bounded = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"} & set(number)
        return number if bounded else {"anyOf": [number, {"enum": NOT_NUMBERS}]}


def report_schema() -> dict[str, Any]:
    """Return the schema, with what the source says of each record and field."""
    schema = AuditReport.model_json_schema(mode="serialization", schema_generator=_Written)
    records = schema.pop("$defs")
    for record in (schema, *records.values()):
        _describe(record)
    head = {
        "$schema": GenerateJsonSchema.schema_dialect,
        "$id": f"urn:dualtok:{REPORT_FORMAT.removeprefix('dualtok-').replace('/', ':')}",
    }
    schema["required"] = ["format", *schema["required"]]  # it has a default for files that are older
    return {**head, **schema, "$defs": records}


def _describe(record: dict[str, Any]) -> None:
    """Put docstrings into the schema of a record, in place of titles that repeat the names."""
    modules = (base, data, details, settings, reruns)
    source = next(getattr(module, record["title"]) for module in modules if hasattr(module, record["title"]))
    record["description"] = doc_of(source)
    docs = field_docs(source)
    for name, field in record["properties"].items():
        field.pop("title", None)
        if name in docs:
            field["description"] = text_of(docs[name])


def main() -> None:
    """Write the schema of the present version; those of earlier versions stay."""
    FOLDER.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(report_schema(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
