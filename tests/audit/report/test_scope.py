"""Who attacked with what, what was not tested, and which requirement is answered."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dualtok.audit.attacks.base import ATTACKS
from dualtok.audit.report.details import AttackReference
from dualtok.audit.report.scope import CLEARLY_WORSE, attackers, not_tested, requirements, unit, weak_references

if TYPE_CHECKING:
    from dualtok.audit.report.data import AuditReport


def reference(name: str, perplexity: float) -> AttackReference:
    return AttackReference(name=name, perplexity_members=1.0, perplexity_non_members=perplexity)


def test_every_attack_that_ran_stands_with_its_kind(large_report: AuditReport) -> None:
    found = attackers(large_report)
    labels = [label for kind in found for label in kind.labels]
    assert sorted(labels) == sorted(result.label for result in large_report.rows[0].attacks)
    by_title = {kind.title: kind for kind in found}
    assert by_title["Shadow models"].labels[:2] == ("LiRA", "LiRA out")
    with_shadows = large_report.model_copy(update={"settings": replace(large_report.settings, shadows=16)})
    assert "16 shadow models" in [kind.title for kind in attackers(with_shadows)]
    assert by_title["Others"].labels == ("Extra",)


def test_a_reference_is_weak_beside_models_that_it_is_clearly_worse_than(large_report: AuditReport) -> None:
    first, second = large_report.rows[:2]
    border = CLEARLY_WORSE * first.perplexity_non_members
    rows = [first, second]

    def weak(*references: AttackReference) -> list[str]:
        return weak_references(rows, list(references))

    assert second.perplexity_non_members > first.perplexity_non_members
    assert weak(reference("a", border)) == []
    assert weak(reference("a", border + 0.01)) == [first.name]
    assert weak(reference("a", 1000)) == [first.name, second.name]
    assert weak(reference("a", 1000), reference("b", border)) == []  # the best one counts
    assert weak() == []


def test_whatever_was_not_tested_is_listed_with_its_reason(
    small_report: AuditReport, large_report: AuditReport
) -> None:
    gaps = {gap.what: gap.why for gap in not_tested(small_report)}
    row = small_report.rows[0]
    listed = ", ".join(gaps)
    for made in ATTACKS.values():
        assert (made.label in listed.split(", ")) is (row.attack(made.name) is None), made.label
    assert gaps["Zlib"] == "needs the compressed sizes of the texts"
    assert "a reference model of the attacker's" in str(gaps)
    for what, why in {
        "Groups, e.g. all documents of one person": "no group field was named",
        "Canaries": "the data was prepared without canaries",
        "True-positive rate at 1\N{NO-BREAK SPACE}% false alarms": "needs 100 non-members",
        "Whether members and non-members differ by themselves": "the checks were not run",
    }.items():
        assert gaps[what] == why
    assert "Word-for-word passages of members" in gaps
    assert "The smallest leak that would have been seen" in gaps
    assert {gap.what for gap in not_tested(large_report)} == {
        "The attacks on a model that saw no member",
        "Attribute inference, model inversion, poisoning",
        "The model behind its interface",
    }


def test_a_gap_of_some_models_names_them(large_report: AuditReport) -> None:
    first, second = large_report.rows[:2]
    rows = [first.model_copy(update={"canaries": None, "not_run": {"New": "needs more"}, "strongest_tpr": []}), second]
    gaps = {gap.what: gap.why for gap in not_tested(large_report.model_copy(update={"rows": rows}))}
    assert gaps[f"Canaries of {first.name}"] == "the data was prepared without canaries"
    assert gaps[f"New on {first.name}"] == "needs more"
    rate = gaps["True-positive rate at 1\N{NO-BREAK SPACE}% false alarms"]
    assert "audit.fpr_targets" in rate  # 418 non-members would have been enough


def test_members_in_no_group_are_a_gap(large_report: AuditReport) -> None:
    first = large_report.rows[0]
    assert first.groups is not None
    left_out = {"members_without_group": 7, "small_member_groups": 3, "min_documents": 5}
    row = first.model_copy(update={"groups": first.groups.model_copy(update=left_out)})
    gaps = {gap.what: gap.why for gap in not_tested(large_report.model_copy(update={"rows": [row]}))}
    assert gaps["Groups of 7 members"] == "their field person is empty"
    assert gaps["3 small groups of members"] == "fewer than 5 documents each"


def test_requirements_say_what_is_not_answered(small_report: AuditReport, large_report: AuditReport) -> None:
    of_small, of_large = (
        {one.source: one.answer for one in requirements(report)} for report in (small_report, large_report)
    )
    assert list(of_small) == list(of_large)
    for article in ("(iii)", "(v)", "(ii), (iv)"):
        assert of_small[f"EDPB Opinion 28/2024, para. 55 {article}"] == "not tested"
    assert "in the table above" in of_large["EDPB Opinion 28/2024, para. 55 (iii)"]
    assert of_large["EDPB Opinion 28/2024, para. 55 (ii), (iv)"] == "not tested"
    assert "up to 2.11" in of_large["NIST SP 800-226"]
    assert "no lower bound" in of_small["NIST SP 800-226"]
    assert of_large["OWASP AISVS 1.0, C11.2.4"] == "no run of this report states one"
    private = small_report.model_copy(update={"identity": {"privacy of dp": "(8, 1e-5)-DP per document"}})
    assert {one.source: one.answer for one in requirements(private)}["OWASP AISVS 1.0, C11.2.4"] == (
        "a statement for dp below"
    )


def test_the_unit_is_the_document_and_the_groups(small_report: AuditReport, large_report: AuditReport) -> None:
    assert unit(small_report) == "one document"
    assert unit(large_report) == "one document, and all documents of one person"
