"""The rule of the report's first screen, at its borders."""

from __future__ import annotations

import pytest

from dualtok.audit.report.base import Estimate
from dualtok.audit.report.data import AuditReport, Checks, Collections, ModelAudit, Strongest
from dualtok.audit.report.details import Power, Regurgitation
from dualtok.audit.report.verdict import LARGEST_UNSEEN, percent, short, verdict_of

SOUND = Checks(blind_auc=Estimate(value=0.5, low=0.45, high=0.55), duplicates=0, shared_passages=0)


@pytest.fixture(scope="session")
def model(large_report: AuditReport) -> ModelAudit:
    """An audit whose attacks found nothing."""
    quiet = next(row for row in large_report.rows if row.name == "base")
    return quiet.model_copy(update={"collections": [], "canaries": None, "regurgitation": None, "groups": None})


def strongest(low: float, value: float = 0.95) -> dict[str, Strongest]:
    return {"strongest": Strongest(label="Ref", auc_two_sided=Estimate(value=value, low=low, high=0.98))}


def test_a_leak_begins_where_the_corrected_lower_end_leaves_a_half(model: ModelAudit) -> None:
    at = verdict_of(model.model_copy(update=strongest(0.5)), SOUND)
    assert (at.kind, at.word) == ("none", "No leak found")
    above = verdict_of(model.model_copy(update=strongest(0.5001)), SOUND)
    assert (above.kind, above.word) == ("leak", "Leak found")
    # Two decimals would say that the interval reaches .5.
    assert "strongest attack .9500 [.5001, .9800] (Ref)" in above.sentence


def test_the_sentence_has_the_figures(large_report: AuditReport) -> None:
    first = large_report.rows[0]
    verdict = verdict_of(first, SOUND)
    assert verdict.sentence.replace("\N{NO-BREAK SPACE}", " ") == (
        "Members can be told from non-members: strongest attack .95 [.91, 1.00] (Ref), 45 % found at 1 % false alarms."
    )
    assert verdict.also == ("groups", "passages", "canaries", "epsilon", "collections")
    without = verdict_of(first.model_copy(update={"strongest_tpr": []}), SOUND)
    assert without.sentence == "Members can be told from non-members: strongest attack .95 [.91, 1.00] (Ref)."


def test_where_nothing_worked_the_smallest_leak_that_would_have_been_seen_is_said(model: ModelAudit) -> None:
    verdict = verdict_of(model, SOUND)
    assert (verdict.kind, verdict.also) == ("none", ())
    assert verdict.sentence == "No attack of 24 worked; a leak above AUC .58 would have been seen (probability .80)."
    one = verdict_of(model.model_copy(update={"attacks": model.attacks[:1]}), SOUND)
    assert one.sentence.startswith("The one attack that was run did not work; a leak above")


@pytest.mark.parametrize(("auc", "kind"), [(LARGEST_UNSEEN, "none"), (LARGEST_UNSEEN + 1e-6, "unknown")])
def test_an_audit_that_would_miss_a_strong_attack_cannot_say_that_there_is_none(
    model: ModelAudit, auc: float, kind: str
) -> None:
    verdict = verdict_of(model.model_copy(update={"power": Power(auc=auc, probability=0.8, simulations=9)}), SOUND)
    assert verdict.kind == kind
    assert ("418 members and 418 non-members a leak up to AUC .70 can go unseen" in verdict.sentence) is (
        kind == "unknown"
    )


@pytest.mark.parametrize(("members", "kind"), [(100, "none"), (99, "unknown")])
def test_figures_without_power_are_judged_by_their_number_of_documents(
    model: ModelAudit, members: int, kind: str
) -> None:
    verdict = verdict_of(model.model_copy(update={"power": None, "n_members": members}), SOUND)
    assert verdict.kind == kind
    assert ("was not computed" in verdict.sentence) is (kind == "none")
    assert (f"{members} members and 418 non-members are too few" in verdict.sentence) is (kind == "unknown")


@pytest.mark.parametrize("low", [0.5, 0.9])
def test_a_void_audit_says_nothing_whatever_its_figures(model: ModelAudit, low: float) -> None:
    row = model.model_copy(update=strongest(low))
    told = "void: a bag of words tells members from non-members without any model (AUC 0.9, from 0.8): split at random"
    for checks in (
        SOUND.model_copy(update={"void": True, "warnings": [told]}),
        SOUND.model_copy(update={"warnings": ["first", told]}),  # figures of before the field was filled
        SOUND.model_copy(update={"void": True}),
    ):
        verdict = verdict_of(row, checks)
        assert (verdict.kind, verdict.word) == ("unknown", "Cannot be said")
        assert verdict.doubtful is bool(checks.warnings)
        expected = "without any model" if checks.warnings else "differ or overlap by themselves"
        assert verdict.sentence.startswith("No figure of this audit means anything: ")
        assert verdict.sentence.endswith(f"{expected}.")


def test_other_warnings_leave_the_verdict_and_make_it_doubtful(model: ModelAudit) -> None:
    warned = verdict_of(model, SOUND.model_copy(update={"warnings": ["5 % of the non-members are members"]}))
    assert (warned.kind, warned.doubtful) == ("none", True)
    assert verdict_of(model, None) == verdict_of(model, SOUND)
    assert not verdict_of(model, None).doubtful


def test_what_leaks_without_an_attack_on_documents_is_a_leak(model: ModelAudit, large_report: AuditReport) -> None:
    loud = large_report.rows[0]
    assert loud.groups is not None
    assert loud.canaries is not None

    def of(**found: object) -> str:
        verdict = verdict_of(model.model_copy(update=found), SOUND)
        assert verdict.kind == "leak"
        start = "No attack on single documents worked, but "
        assert verdict.sentence.startswith(start)
        return verdict.sentence.removeprefix(start).replace("\N{NO-BREAK SPACE}", " ")

    assert of(groups=loud.groups).startswith(
        "all documents of one person together can be told from others: .95 [.85, 1.00]"
    )
    quiet = Strongest(label="Ref", auc_two_sided=Estimate(value=0.55, low=0.5, high=0.6)).auc_two_sided
    worst = loud.groups.model_copy(update={"strongest": quiet})
    assert of(groups=worst).startswith(
        "the documents of one person (9f2c61d0) can be told from non-members: 1.00 [.92,"
    )
    assert of(regurgitation=loud.regurgitation) == (
        "50 tokens come back word for word of 15 % of the members (0 % of the non-members)."
    )
    assert of(canaries=loud.canaries).startswith("35 % of the planted canaries' secrets come back word for word")
    unlearned = loud.canaries.model_copy(update={"extracted_included": loud.canaries.extracted_excluded})
    assert of(canaries=unlearned) == "guesses about planted canaries refute an epsilon below 2.11 (delta 0)."
    assert of(collections=loud.collections).startswith("10 documents together can be told from as many others (p .006")


def test_what_does_not_stand_out_is_no_leak(model: ModelAudit) -> None:
    touching = Regurgitation(
        length=50,
        extracted_members=Estimate(value=0.1, low=0.02, high=0.2),
        extracted_non_members=Estimate(value=0.0, low=0.0, high=0.02),
    )
    assert verdict_of(model.model_copy(update={"regurgitation": touching}), SOUND).kind == "none"

    def collection(p_holm: float) -> Collections:
        ends = {"rejected": 0.0, "rejected_low": 0.0, "rejected_high": 1.0}
        return Collections(label="Ref", size=10, p_value=0.01, p_holm=p_holm, collections=4, **ends)

    for p_holm, kind in ((0.0501, "none"), (0.05, "leak")):
        assert verdict_of(model.model_copy(update={"collections": [collection(p_holm)]}), SOUND).kind == kind


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (1e-4, "< 0.1"),
        (0.004, "0.4"),
        (0.01, "1"),
        (0.484, "48"),
        (0.997, "99.7"),
        (0.9999, "> 99.9"),
        (1, "100"),
    ],
)
def test_percentages_read_as_none_or_all_only_where_they_are(value: float, shown: str) -> None:
    assert percent(value) == f"{shown}\N{NO-BREAK SPACE}%"


def test_short_figures() -> None:
    assert short(Estimate(value=0.5, low=0.5, high=1)) == ".50 [.50, 1.00]"
    assert short(Estimate(value=0.612, low=0.502, high=0.7)) == ".612 [.502, .700]"
