"""docs/schema/ is what the records give, and what they write keeps to it."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from dualtok.audit.report.data import AuditFigures
from dualtok.audit.report.write import load_report, write_report
from tests.audit.report.small import full_report, report
from tools.write_schema import FILE, NOT_NUMBERS, report_schema

SCHEMA: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_the_schema_is_what_the_records_give() -> None:
    """After a change: python tools/write_schema.py."""
    assert report_schema() == SCHEMA
    assert FILE.name == "report-1.schema.json"


def test_it_is_a_schema_in_which_everything_is_described() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert all(record["description"] for record in SCHEMA["$defs"].values())
    assert "Bonferroni" in SCHEMA["$defs"]["Strongest"]["properties"]["auc_two_sided"]["description"]
    assert "title" not in SCHEMA["properties"]["rows"]


def test_what_is_written_keeps_to_the_schema(tmp_path: Any) -> None:
    for made in (report(), full_report()):
        path = write_report(made, tmp_path).with_suffix(".json")
        content = json.loads(path.read_text())
        assert content["format"] == "dualtok-report/1"
        VALIDATOR.validate(content)
        assert load_report(path).model_dump_json() == made.model_dump_json()
    assert content["rows"][1]["perplexity_members"] == "Infinity"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("rows", 0, "n_members"), -1),
        (("rows", 0, "strongest", "auc_two_sided", "value"), "high"),
        (("gate", "verdict"), "fine"),
        (("format",), "dualtok-report/2"),
        (("checks", "duplicates"), 1.5),
        (("rows", 0, "perplexity_members"), "inf"),
        (("colour",), "red"),
    ],
)
def test_what_a_report_cannot_hold_is_refused(place: tuple[Any, ...], value: Any) -> None:
    content = json.loads(full_report().model_dump_json())
    VALIDATOR.validate(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    assert not VALIDATOR.is_valid(content)


def test_a_report_without_its_format_is_refused_by_the_schema_alone(tmp_path: Any) -> None:
    content = json.loads(report().model_dump_json())
    del content["format"]
    assert not VALIDATOR.is_valid(content)
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert load_report(tmp_path / "report.json") == report(), "reports of 0.2.0 have none"


def test_not_a_number_is_written_as_the_schema_says() -> None:
    row_ = full_report().rows[1]
    written = json.loads(row_.model_dump_json())
    assert written["perplexity_members"] in NOT_NUMBERS
    assert written["loss_gap"] in NOT_NUMBERS
    assert AuditFigures.model_config["ser_json_inf_nan"] == "strings"
