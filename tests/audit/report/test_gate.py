"""Every limit at its border, and everything that cannot be said."""

from __future__ import annotations

from typing import Any

import pytest

from dualtok.audit.report.data import Checks, NullModel, Strongest, StrongestTpr
from dualtok.audit.report.details import GateVerdict, Power
from dualtok.audit.report.gate import GateLimits, TprLimit, judge, number, require_compared, verdict_line
from dualtok.audit.report.page import render_html
from dualtok.audit.settings import AuditConfig
from dualtok.errors import ConfigError
from tests.audit.report.small import SOUND, canaries, estimate, groups_of, regurgitation, report, row


def one(verdict: GateVerdict) -> tuple[str, float | None, str]:
    [check] = verdict.checks
    assert check.verdict == verdict.verdict
    return check.verdict, check.value, check.reason


def auc(limit: float) -> GateLimits:
    return GateLimits(strongest_auc=limit)


def tpr(limit: float, fpr: float = 0.01) -> GateLimits:
    return GateLimits(tpr=(TprLimit(limit, fpr),))


@pytest.mark.parametrize(
    ("compare", "value", "limit"), [("high", 0.58, 0.58), ("value", 0.55, 0.55), ("low", 0.5, 0.5)]
)
def test_a_figure_equal_to_its_limit_passes_and_one_above_does_not(compare: Any, value: float, limit: float) -> None:
    assert one(judge(report(), auc(limit), compare=compare))[:2] == ("passed", value)
    more = row(strongest=Strongest(label="Ref", auc_two_sided=estimate(0.551, 0.501, 0.581)))
    verdict, found, _ = one(judge(report(more), auc(limit), compare=compare))
    assert (verdict, found) == ("above", pytest.approx(value + 0.001))


def test_a_difference_of_rounding_is_none() -> None:
    almost = row(strongest=Strongest(label="Ref", auc_two_sided=estimate(0.5, 0.5, 0.1 + 0.2 + 0.3)))
    assert 0.1 + 0.2 + 0.3 > 0.6
    assert judge(report(almost), auc(0.6)).verdict == "passed"


def test_an_upper_end_above_a_limit_that_the_figure_keeps_to_says_so() -> None:
    assert "the figure itself, .55, is not" in one(judge(report(), auc(0.57)))[2]
    assert one(judge(report(), auc(0.54)))[2] == ""


def test_tpr_is_compared_at_its_own_rate() -> None:
    assert one(judge(report(), tpr(0.05)))[:2] == ("passed", 0.05)
    assert one(judge(report(), tpr(0.0499)))[:2] == ("above", 0.05)
    several = GateLimits(tpr=(TprLimit(0.05, 0.01), TprLimit(0.2, 0.001), TprLimit(0.5, 0.1)))
    verdict = judge(report(), several)
    assert [check.verdict for check in verdict.checks] == ["passed", "cannot be said", "cannot be said"]
    assert verdict.checks[1].reason == "too few documents: 1000 non-members, fewer than 1/0.001"
    assert "add 0.1 to audit.fpr_targets" in verdict.checks[2].reason
    assert (verdict.verdict, verdict.checks[1].value) == ("cannot be said", None)


def test_a_rate_without_an_interval_for_the_strongest_is_compared_as_a_value_alone() -> None:
    old = report(row(strongest_tpr=[]))
    assert one(judge(old, tpr(0.03), compare="value"))[:2] == ("passed", 0.03)
    assert one(judge(old, tpr(0.029), compare="value"))[:2] == ("above", 0.03)
    for compare in ("high", "low"):
        verdict, value, reason = one(judge(old, tpr(0.9), compare=compare))  # type: ignore[arg-type]
        assert (verdict, value) == ("cannot be said", None)
        assert "no interval that holds for the strongest" in reason


def test_no_member_found_among_few_says_nothing() -> None:
    nothing = [StrongestTpr(target_fpr=0.01, label="Ref", tpr=estimate(0, 0, 0))]
    floor = 1 - 0.025 ** (1 / 72)  # .0499: the fewest documents for a limit of 5 %
    assert floor < 0.05
    assert judge(report(row(documents=72, strongest_tpr=nothing)), tpr(0.05)).verdict == "passed"
    verdict, value, reason = one(judge(report(row(documents=71, strongest_tpr=nothing)), tpr(0.05)))
    assert (verdict, value) == ("cannot be said", None)
    assert reason == "too few documents: if none of 71 members is found, the rate may still be .05063"
    some = [StrongestTpr(target_fpr=0.01, label="Ref", tpr=estimate(0.1, 0.02, 0.2))]
    assert judge(report(row(documents=20, strongest_tpr=some)), tpr(0.05)).verdict == "above"
    assert judge(report(row(documents=20, strongest_tpr=nothing)), tpr(0.05), compare="value").verdict == "passed"


@pytest.mark.parametrize(
    ("checks", "word"),
    [
        (None, "no checks"),
        (SOUND.model_copy(update={"void": True}), "void"),
        (SOUND.model_copy(update={"blind_auc": estimate(0.6, 0.501, 0.7)}), "void"),
        (SOUND.model_copy(update={"blind_auc": None}), "too few documents"),
    ],
)
def test_attacks_of_a_void_or_unchecked_audit_say_nothing(checks: Checks | None, word: str) -> None:
    groups = groups_of(0.5, 0.5)
    model = row(groups=groups, canaries=canaries(0.1, 0.1), regurgitation=regurgitation(0, 0.01))
    limits = GateLimits(0.9, (TprLimit(0.9, 0.01),), 0.5, 0.9, 3)
    found = judge(report(model, checks=checks), limits)
    assert len(found.checks) == 7
    said = {check.figure: check.verdict for check in found.checks if check.verdict != "cannot be said"}
    assert set(said) == {
        "extracted members",
        "epsilon, lower bound at delta 0",
        "epsilon, lower bound at delta 1e-05",
    }, "they need no comparison with non-members"
    assert set(said.values()) == {"passed"}
    assert all(word in check.reason for check in found.checks if check.verdict == "cannot be said")
    assert found.verdict == "cannot be said"


def test_a_blind_interval_that_begins_at_chance_voids_nothing() -> None:
    border = SOUND.model_copy(update={"blind_auc": estimate(0.6, 0.5, 0.7)})
    assert judge(report(checks=border), auc(0.58)).verdict == "passed"


def test_a_lower_end_passes_only_where_such_a_leak_would_have_been_seen() -> None:
    power = Power(auc=0.6, probability=0.8, simulations=100)
    assert judge(report(row(power=power)), auc(0.6), compare="low").verdict == "passed"
    weak = judge(report(row(power=power)), auc(0.59), compare="low")
    assert weak.verdict == "cannot be said"
    assert weak.checks[0].reason == "too few documents: a leak below AUC .6 would not have been seen"
    assert judge(report(row(power=power)), auc(0.59)).verdict == "passed", "an upper end needs no such help"
    strong = row(power=power, strongest=Strongest(label="Ref", auc_two_sided=estimate(0.7, 0.595, 0.8)))
    assert judge(report(strong), auc(0.59), compare="low").verdict == "above"


def extraction(limit: float) -> GateLimits:
    return GateLimits(extraction=limit)


def test_extraction_is_of_members_and_of_canaries() -> None:
    both = row(regurgitation=regurgitation(0.01, 0.02), canaries=canaries(extracted=estimate(0, 0, 0.03)))
    found = judge(report(both), extraction(0.02))
    assert [(check.figure, check.verdict) for check in found.checks] == [
        ("extracted members", "passed"),
        ("extracted canaries", "above"),
    ]
    assert judge(report(both), extraction(0.03)).verdict == "passed"
    assert one(judge(report(row(canaries=canaries(extracted=None))), extraction(0.03)))[0] == "cannot be said"
    assert "not measured" in one(judge(report(), extraction(0.03)))[2]


def test_a_limit_of_0_is_compared_with_what_came_back() -> None:
    none = judge(report(row(regurgitation=regurgitation(0, 0.02))), extraction(0))
    assert one(none) == ("passed", 0, "a limit of 0 is compared with the figure itself")
    assert none.checks[0].compared == "value"
    assert one(judge(report(row(regurgitation=regurgitation(0.001, 0.02))), extraction(0)))[:2] == ("above", 0.001)


@pytest.mark.parametrize(
    ("worst", "strongest", "verdict"), [(0.7, 0.7, "passed"), (0.71, 0.7, "above"), (0.7, 0.71, "above")]
)
def test_groups_are_judged_by_the_worst_and_by_all(worst: float, strongest: float, verdict: str) -> None:
    model = row(groups=groups_of(worst, strongest))
    assert judge(report(model), GateLimits(group_auc=0.7)).verdict == verdict
    assert "not measured" in one(judge(report(), GateLimits(group_auc=0.7)))[2]


def test_epsilon_has_lower_bounds_alone() -> None:
    found = judge(report(row(canaries=canaries(2.0, 1.5))), GateLimits(epsilon=2))
    assert [(check.value, check.verdict, check.compared) for check in found.checks] == [
        (2.0, "passed", "low"),
        (1.5, "passed", "low"),
    ]
    assert "none was excluded" in found.checks[0].reason
    assert judge(report(row(canaries=canaries(2.01, 1.5))), GateLimits(epsilon=2)).verdict == "above"
    assert "no canaries" in one(judge(report(), GateLimits(epsilon=2)))[2]


def test_too_few_canaries_for_an_epsilon_cannot_pass() -> None:
    # Ten coins, all guessed right, refute epsilon up to log(p / (1 - p)) with p = (.05 / 4)^(1 / 10).
    model = row(canaries=canaries(0.4, number=10))
    assert one(judge(report(model), GateLimits(epsilon=0.59)))[0] == "passed"
    verdict, value, reason = one(judge(report(model), GateLimits(epsilon=0.6)))
    assert (verdict, value) == ("cannot be said", None)
    assert reason == "too few canaries: with every coin guessed right the bound would be 0.598"


def test_the_null_model_and_the_attackers_reference_are_left_out_unless_they_are_named() -> None:
    null = NullModel(name="base", strongest=row().strongest, p_value=0.5)
    settings = AuditConfig(models={"base": "b", "dual": "d", "attacker": "a"}, attack_reference="a")
    of_three = report(
        row("base"),
        row("dual"),
        row("attacker"),
        settings=settings,
        checks=SOUND.model_copy(update={"null_model": null}),
    )
    found = judge(of_three, auc(0.58))
    assert [check.model for check in found.checks] == ["dual"]
    assert found.left_out == {"base": "the null model", "attacker": "the attacker's reference"}
    named = judge(of_three, auc(0.58), models=["attacker", "base"])
    assert [check.model for check in named.checks] == ["base", "attacker"]
    assert named.left_out == {"dual": "not named"}
    without_checks = report(row("base"), row("dual"), settings=AuditConfig(models={"base": "b"}, null_model="base"))
    assert [check.model for check in judge(without_checks, auc(0.58)).checks] == ["dual"]
    with pytest.raises(ConfigError, match="did you mean 'dual'"):
        judge(of_three, auc(0.58), models=["duel"])
    with pytest.raises(ConfigError, match="base is the null model; give --model"):
        judge(report(row("base"), settings=settings, checks=of_three.checks), auc(0.58))


def test_one_above_counts_before_one_that_cannot_be_said() -> None:
    limits = GateLimits(strongest_auc=0.57, tpr=(TprLimit(0.5, 0.001),))
    found = judge(report(), limits)
    assert [check.verdict for check in found.checks] == ["above", "cannot be said"]
    assert found.verdict == "above"
    assert verdict_line(found) == "gate not passed: 1 of 2 figures above the limit: dual: strongest AUC .58 > .57"


def test_the_verdict_is_one_line() -> None:
    passed = judge(report(row("a"), row("b")), auc(0.58))
    line = "gate passed: 2 figures of 2 models, none above its limit (compared: upper end of the interval)"
    assert verdict_line(passed) == line
    unsaid = judge(report(), tpr(0.5, 0.001))
    assert verdict_line(unsaid) == (
        "gate not passed: 1 of 1 figure cannot be said: dual: TPR at 0.1 % FPR "
        "(too few documents: 1000 non-members, fewer than 1/0.001)"
    )
    assert (number(0), number(1), number(0.58), number(2.5)) == ("0", "1", ".58", "2.5")


def test_an_earlier_verdict_plays_no_part() -> None:
    before = report()
    verdict = judge(before, auc(0.57))
    assert judge(before.model_copy(update={"gate": verdict}), auc(0.57)) == verdict


@pytest.mark.parametrize(
    ("limits", "word"),
    [
        ({}, "at least one limit"),
        ({"strongest_auc": 0.49}, "--max-strongest-auc 0.49"),
        ({"strongest_auc": 1.01}, "--max-strongest-auc 1.01"),
        ({"strongest_auc": float("nan")}, "--max-strongest-auc nan"),
        ({"group_auc": 0.4}, "--max-group-auc 0.4"),
        ({"extraction": -0.1}, "--max-extraction -0.1"),
        ({"extraction": 1.1}, "--max-extraction 1.1"),
        ({"epsilon": -1}, "--max-epsilon -1"),
        ({"epsilon": float("inf")}, "--max-epsilon inf"),
        ({"tpr": (TprLimit(0.5, 0),)}, "between 0 and 1"),
        ({"tpr": (TprLimit(0.5, 1),)}, "between 0 and 1"),
        ({"tpr": (TprLimit(0.009, 0.01),)}, "which guessing reaches"),
        ({"tpr": (TprLimit(1.1, 0.01),)}, "to 1"),
        ({"tpr": (TprLimit(0.5, 0.01), TprLimit(0.4, 0.01))}, "only once"),
    ],
)
def test_limits_out_of_range_are_refused(limits: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        GateLimits(**limits)


def test_limits_at_the_ends_of_their_range_are_taken() -> None:
    tpr = (TprLimit(0.01, 0.01), TprLimit(1, 0.1))
    limits = GateLimits(strongest_auc=0.5, tpr=tpr, extraction=0, group_auc=1, epsilon=0)
    assert (limits.strongest_auc, limits.tpr, limits.extraction, limits.group_auc) == (0.5, tpr, 0, 1)
    assert GateLimits(extraction=1).extraction == 1


def test_what_is_compared_must_be_known() -> None:
    assert require_compared("low") == "low"
    with pytest.raises(ConfigError, match=r"--compare 'upper': must be one of value, low, high"):
        require_compared("upper")


def test_the_page_shows_the_verdict_and_what_it_rests_on() -> None:
    before = report(row("a <b>"), row("base"), settings=AuditConfig(models={"base": "b"}, null_model="base"))
    assert 'id="gate"' not in render_html(before)
    page = render_html(before.model_copy(update={"gate": judge(before, GateLimits(0.57, extraction=0))}))
    fold = page[page.index('id="gate"') :]
    assert "upper ends of intervals" in fold
    assert '<td>strongest AUC</td><td class="number">0.57</td><td class="number">0.58</td><td>above' in fold
    assert '<td>extraction</td><td class="number">0</td><td class="number">n/a</td><td>cannot be said' in fold
    assert "Not judged: base (the null model)." in fold
    low = before.model_copy(update={"gate": judge(before, GateLimits(0.57), compare="low")})
    assert "lower ends of intervals" in render_html(low)
