from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from dualtok.audit.report.data import AuditReport, Estimate, ModelAudit, SelectionSeries, TokenHistogram, TrainingSeries


def test_json_round_trip(report: AuditReport) -> None:
    assert AuditReport.model_validate_json(report.model_dump_json()) == report


def test_an_infinite_perplexity_survives_json(model_rows: list[ModelAudit]) -> None:
    row = model_rows[0].model_copy(update={"perplexity_members": math.inf})
    assert ModelAudit.model_validate_json(row.model_dump_json()).perplexity_members == math.inf


def test_unknown_keys_are_refused(report: AuditReport) -> None:
    with pytest.raises(ValidationError, match="colour"):
        AuditReport.model_validate(report.model_dump() | {"colour": "red"})


def test_rows_need_distinct_names(report: AuditReport, model_rows: list[ModelAudit]) -> None:
    for rows in ([], [model_rows[0], model_rows[0]]):
        with pytest.raises(ValidationError, match="distinct names"):
            AuditReport(title="t", created="now", rows=rows)


def test_records_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValidationError, match="not within"):
        Estimate(value=0.4, low=0.5, high=0.6)
    with pytest.raises(ValidationError, match="one count per bin"):
        TokenHistogram(edges=[0, 1], members=[1], non_members=[1, 2], mean_members=0, mean_non_members=0)
    with pytest.raises(ValidationError, match="2 steps"):
        SelectionSeries(run="r", steps=[1, 2], hard=[0.5], memorized=[0.1])
    with pytest.raises(ValidationError, match="exceed 1"):
        SelectionSeries(run="r", steps=[1], hard=[0.7], memorized=[0.4])
    with pytest.raises(ValidationError, match="1 steps, 2 values"):
        TrainingSeries(run="r", figure="ref_auc", steps=[1], values=[0.1, 0.2])


def test_neutral_is_what_is_left() -> None:
    series = SelectionSeries(run="r", steps=[1, 2], hard=[0.6, 0.5], memorized=[0.1, 0.5])
    assert series.neutral == pytest.approx([0.3, 0.0])
