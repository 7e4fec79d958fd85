"""The bill of materials: valid by the official schema, and with the report's own figures."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from dualtok.audit.report.cards.cyclonedx import bill_of_materials, render_cyclonedx
from dualtok.audit.settings import AuditConfig
from tests.audit.report.small import SOUND, full_report, row
from tests.audit.report.small import report as small_report

if TYPE_CHECKING:
    from dualtok.audit.report.data import AuditReport

OFFICIAL = JsonStrictValidator(SchemaVersion.V1_6)


def component(of: AuditReport, number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = bill_of_materials(of)["components"][number]
    return found


def metrics(of: AuditReport, number: int = 0) -> dict[tuple[str, str], dict[str, Any]]:
    listed = component(of, number)["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    found = {(metric["type"], metric["slice"]): metric for metric in listed}
    assert len(found) == len(listed), "each figure once"
    return found


def test_the_official_validator_takes_it(report: AuditReport) -> None:
    for made in (report, full_report()):
        assert OFFICIAL.validate_str(render_cyclonedx(made)) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda bill: bill["components"][0].update(type="model"),
        lambda bill: bill["components"][0]["modelCard"].update(metrics=[]),
        lambda bill: bill["metadata"].update(timestamp="yesterday"),
    ],
)
def test_the_official_validator_would_see_a_mistake(spoil: Any) -> None:
    bill = bill_of_materials(full_report())
    spoil(bill)
    assert OFFICIAL.validate_str(json.dumps(bill)) is not None


def test_every_audited_model_is_a_component_with_its_figures(report: AuditReport) -> None:
    bill = bill_of_materials(report)
    assert [part["type"] for part in bill["components"]] == ["machine-learning-model"] * len(report.rows)
    assert [part["name"] for part in bill["components"]] == [row.name for row in report.rows]
    assert bill["metadata"]["timestamp"] == report.created
    for number, model in enumerate(report.rows):
        found = metrics(report, number)
        best = model.strongest
        [strongest] = [metric for (name, _), metric in found.items() if name.startswith("membership inference AUC")]
        assert strongest["type"] == f"membership inference AUC (strongest of {len(model.attacks)})"
        assert f", {best.label}," in strongest["slice"]
        assert float(strongest["value"]) == pytest.approx(best.auc_two_sided.value, rel=1e-5)
        assert float(strongest["confidenceInterval"]["lowerBound"]) == pytest.approx(best.auc_two_sided.low, rel=1e-5)
        assert float(strongest["confidenceInterval"]["upperBound"]) == pytest.approx(best.auc_two_sided.high, rel=1e-5)
        for attack in model.attacks:
            one = found[f"AUC of {attack.label}, one-sided", f"members against non-members, {attack.label}"]
            assert float(one["value"]) == pytest.approx(attack.auc.value, rel=1e-5)
        assert float(found["perplexity", "non-members"]["value"]) == pytest.approx(
            model.perplexity_non_members, rel=1e-5
        )
        assert "confidenceInterval" not in found["perplexity", "non-members"]


def test_optional_parts_are_listed_where_they_were_measured() -> None:
    whole, diverged = metrics(full_report(), 0), metrics(full_report(), 1)
    bound = whole["epsilon is at least, at delta 0", "canaries, Ref: 200 of 200 guesses right"]
    assert (bound["value"], bound["confidenceInterval"]) == ("2", {"lowerBound": "2"})
    for name in ("word for word", "worst group", "of groups"):
        assert any(name in kind for kind, _ in whole)
        assert not any(name in kind for kind, _ in diverged)
    assert diverged["perplexity", "members"]["value"] == "inf"


def test_what_was_not_tested_and_what_casts_doubt_are_limitations() -> None:
    checks = SOUND.model_copy(update={"warnings": ["duplicates: 3 %"]})
    made = full_report().model_copy(update={"checks": checks})
    whole, diverged = (
        component(made, number)["modelCard"]["considerations"]["technicalLimitations"] for number in (0, 1)
    )
    assert whole[0] == diverged[0] == "Doubtful: duplicates: 3 %"
    assert any(text.startswith("Not tested: Canaries") for text in diverged)
    assert not any(text.startswith("Not tested: Canaries") for text in whole), "of another model"
    assert "no guarantee" in whole[-1]


def test_digests_confidence_and_the_gates_verdict_are_properties() -> None:
    made = full_report().model_copy(update={"hashes": {"data": "aa", "model whole": "bb", "model diverged": "cc"}})
    found = {entry["name"]: entry["value"] for entry in component(made)["properties"]}
    assert found == {
        "dualtok:sha256:data": "aa",
        "dualtok:sha256:model": "bb",
        "dualtok:confidence": "0.95",
        "dualtok:gate:strongest AUC": "passed: 0.58, limit 0.58",
    }


def test_a_statement_of_privacy_is_the_mitigation_of_its_own_model() -> None:
    made = small_report(row("dp"), row("plain"), identity={"privacy of dp": "epsilon 8"})
    risks = [
        component(made, number)["modelCard"]["considerations"]["ethicalConsiderations"][0]["mitigationStrategy"]
        for number in (0, 1)
    ]
    assert risks == ["Differential privacy: epsilon 8", "None is stated by this report."]


def test_the_same_report_gives_the_same_bytes_and_another_another_number() -> None:
    assert render_cyclonedx(small_report()) == render_cyclonedx(small_report())
    assert (
        bill_of_materials(small_report())["serialNumber"]
        != bill_of_materials(small_report(row("other")))["serialNumber"]
    )


def test_no_path_and_no_configuration_is_in_it() -> None:
    settings = AuditConfig(models={"dual": "/home/someone/model"})
    made = small_report(
        settings=settings, identity={"data": "/home/someone/data"}, configs={"dual": "path: /home/someone"}
    )
    assert "someone" not in render_cyclonedx(made)


@pytest.mark.parametrize("created", ["now", "2025-01-02", "2025-01-02T03:04:05", "2025-01-02 03:04:05+00:00"])
def test_a_time_that_the_format_does_not_take_is_left_out(created: str) -> None:
    made = small_report().model_copy(update={"created": created})
    assert "timestamp" not in bill_of_materials(made)["metadata"]
    assert OFFICIAL.validate_str(render_cyclonedx(made)) is None
