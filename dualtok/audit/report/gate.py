"""Whether a report's figures keep to limits: the logic of ``dualtok gate``.

A figure that equals its limit keeps to it. What an audit did not measure, or could not, is never taken for a pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from dualtok.audit.report.base import Estimate
from dualtok.audit.report.details import Compared, GateCheck, GateVerdict, Verdict
from dualtok.audit.report.verdict import void_reason
from dualtok.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dualtok.audit.report.data import AuditReport, Checks, EpsilonBound, ModelAudit

ROUNDING = 1e-9
"""Difference up to which a figure equals its limit."""
STRICTEST_FIRST: tuple[Verdict, ...] = ("above", "cannot be said", "passed")
AUDIT_AGAIN = "run `dualtok audit` and `dualtok report` again"


@dataclass(frozen=True)
class TprLimit:
    """The largest true-positive rate at a false-positive rate."""

    limit: float
    fpr: float


@dataclass(frozen=True)
class GateLimits:
    """The largest figures that a model may have; None, or no entry, for those without a limit."""

    strongest_auc: float | None = None
    """Of the two-sided AUC of the strongest attack, .5 to 1."""
    tpr: tuple[TprLimit, ...] = ()
    """Of the strongest attack, one per false-positive rate."""
    extraction: float | None = None
    """Of the share of members, and of canaries, that the model gives back word for word."""
    group_auc: float | None = None
    """Of the AUC of the worst group, and of the strongest attack on whole groups, .5 to 1."""
    epsilon: float | None = None
    """Of the lower bounds on epsilon."""

    def __post_init__(self) -> None:
        """Refuse limits out of range, and none at all."""
        for name, limit in (("--max-strongest-auc", self.strongest_auc), ("--max-group-auc", self.group_auc)):
            if limit is not None and not 0.5 <= limit <= 1:
                raise ConfigError(f"{name} {limit:g}: give a two-sided AUC, .5 (guessing) to 1")
        if self.extraction is not None and not 0 <= self.extraction <= 1:
            raise ConfigError(f"--max-extraction {self.extraction:g}: give a share, 0 to 1")
        if self.epsilon is not None and not 0 <= self.epsilon < math.inf:
            raise ConfigError(f"--max-epsilon {self.epsilon:g}: give a number of at least 0")
        for tpr in self.tpr:
            if not 0 < tpr.fpr < 1:
                raise ConfigError(
                    f"--max-tpr {tpr.limit:g}@{tpr.fpr:g}: the false-positive rate must lie between 0 and 1"
                )
            if not tpr.fpr <= tpr.limit <= 1:
                raise ConfigError(
                    f"--max-tpr {tpr.limit:g}@{tpr.fpr:g}: give a limit from {tpr.fpr:g}, which guessing reaches, to 1"
                )
        rates = [tpr.fpr for tpr in self.tpr]
        if len(set(rates)) < len(rates):
            raise ConfigError("--max-tpr: give each false-positive rate only once")
        if not rates and self.strongest_auc is self.extraction is self.group_auc is self.epsilon is None:
            raise ConfigError("give at least one limit, e.g. --max-strongest-auc .58")


@dataclass(frozen=True)
class _Found:
    """A figure of one model that a limit is put on."""

    name: str
    limit: float
    estimate: Estimate | None
    note: str = ""
    """Why there is no estimate, or what is to be known about it."""
    trials: int | None = None
    """Documents that a share was counted among, where its interval may be too narrow for few of them."""


def judge(
    report: AuditReport, limits: GateLimits, *, compare: Compared = "high", models: Sequence[str] = ()
) -> GateVerdict:
    """Compare a report's figures with limits.

    Args:
        report: of ``dualtok report``; a verdict that it already holds plays no part.
        limits: the largest figures allowed.
        compare: the figure itself, or an end of its interval. Bounds on epsilon have no upper end and are compared as
            they are; so is a share whose limit is 0, since no number of documents brings its upper end down to 0.
        models: names of the models to judge. Without any, all but the null model and the attacker's reference.

    Raises:
        ConfigError: a name is none of the report's, or no model is left.
    """
    rows, left_out = _chosen(report, models)
    checks = [check for row in rows for check in _checks_of(row, report, limits, compare)]
    worst = min((check.verdict for check in checks), key=STRICTEST_FIRST.index)
    return GateVerdict(verdict=worst, checks=checks, compare=compare, left_out=left_out)


def verdict_line(verdict: GateVerdict) -> str:
    """Return the verdict in one line."""
    models = len({check.model for check in verdict.checks})
    concerned = [check for check in verdict.checks if check.verdict == verdict.verdict]
    if verdict.verdict == "passed":
        return (
            f"gate passed: {_count(len(concerned), 'figure')} of {_count(models, 'model')}, none above its limit "
            f"(compared: {COMPARED[verdict.compare]})"
        )
    what = "above the limit" if verdict.verdict == "above" else "cannot be said"
    told = "; ".join(f"{check.model}: {check.figure} {_told(check)}" for check in concerned)
    return f"gate not passed: {len(concerned)} of {_count(len(verdict.checks), 'figure')} {what}: {told}"


COMPARED: dict[Compared, str] = {
    "value": "the figure itself",
    "low": "lower end of the interval",
    "high": "upper end of the interval",
}


def number(value: float) -> str:
    """Return a figure or a limit with four digits, and without a leading zero: .5812."""
    return f"{value:.4g}".removeprefix("0") or "0"


def _told(check: GateCheck) -> str:
    return f"({check.reason})" if check.value is None else f"{number(check.value)} > {number(check.limit)}"


def _count(things: int, name: str) -> str:
    return f"{things} {name}{'' if things == 1 else 's'}"


def _chosen(report: AuditReport, models: Sequence[str]) -> tuple[list[ModelAudit], dict[str, str]]:
    """Return the rows to judge, and the names of the others with the reason."""
    names = [row.name for row in report.rows]
    for name in models:
        if name not in names:
            known = ", ".join(names)
            raise ConfigError(f"--model {name!r}: no model of this report{did_you_mean(name, names)}; it has {known}")
    left_out = {name: "not named" for name in names if name not in models} if models else _not_to_release(report)
    rows = [row for row in report.rows if row.name not in left_out]
    if not rows:
        raise ConfigError(
            f"no model to judge: {', '.join(f'{n} is {why}' for n, why in left_out.items())}; give --model"
        )
    return rows, left_out


def _not_to_release(report: AuditReport) -> dict[str, str]:
    """Return the models that saw no member, as far as the report can tell."""
    settings, checks = report.settings, report.checks
    null = checks.null_model.name if checks is not None and checks.null_model is not None else settings.null_model
    reference = settings.attack_reference
    left_out = {}
    for row in report.rows:
        if row.name == null:
            left_out[row.name] = "the null model"
        elif reference is not None and settings.models.get(row.name) == reference:
            left_out[row.name] = "the attacker's reference"
    return left_out


def _checks_of(row: ModelAudit, report: AuditReport, limits: GateLimits, compare: Compared) -> Iterator[GateCheck]:
    doubt = _doubt(report.checks)
    for found in _attack_figures(row, limits, compare):
        unsure = _Found(found.name, found.limit, None, doubt) if doubt and found.estimate is not None else found
        yield _compare(row.name, unsure, compare, report.settings.confidence, _unseen(row, unsure, compare))
    if limits.extraction is not None:
        for found in _extractions(row, limits.extraction):
            yield _compare(row.name, found, compare, report.settings.confidence)
    if limits.epsilon is not None:
        yield from _epsilons(row, limits.epsilon, report.settings.confidence)


def _doubt(checks: Checks | None) -> str:
    """Return why no attack's figure says anything, or "" if they do."""
    if checks is None:
        return f"the report holds no checks of its members and non-members; {AUDIT_AGAIN}"
    void = void_reason(checks)
    if void is None and checks.blind_auc is not None and checks.blind_auc.low > 0.5:
        void = "members and non-members differ by themselves"
    if void is not None:
        return f"the audit is void: {void}"
    if checks.blind_auc is None:
        return "too few documents to check whether members and non-members differ by themselves"
    return ""


def _attack_figures(row: ModelAudit, limits: GateLimits, compare: Compared) -> Iterator[_Found]:
    """Yield the figures that rest on telling members from non-members."""
    if limits.strongest_auc is not None:
        yield _Found("strongest AUC", limits.strongest_auc, row.strongest.auc_two_sided)
    for tpr in limits.tpr:
        yield _tpr(row, tpr, compare)
    if limits.group_auc is not None:
        if row.groups is None:
            note = f"not measured: the audit has no groups; name their field and {AUDIT_AGAIN}"
            yield _Found("worst group's AUC", limits.group_auc, None, note)
        else:
            yield _Found("worst group's AUC", limits.group_auc, row.groups.worst.auc)
            yield _Found("strongest AUC on groups", limits.group_auc, row.groups.strongest)


def _tpr(row: ModelAudit, wanted: TprLimit, compare: Compared) -> _Found:
    """Return the strongest attack's true-positive rate at a false-positive rate, or why there is none."""
    name = f"TPR at {100 * wanted.fpr:g} % FPR"
    rates = [rate for attack in row.attacks for rate in attack.tpr if math.isclose(rate.target_fpr, wanted.fpr)]
    best = next((rate for rate in row.strongest_tpr if math.isclose(rate.target_fpr, wanted.fpr)), None)
    if best is not None:
        note = next((rate.note for rate in rates if rate.note), "")
        return _Found(name, wanted.limit, best.tpr, note, trials=row.n_members)
    if not rates:
        return _Found(
            name, wanted.limit, None, f"not measured: add {wanted.fpr:g} to audit.fpr_targets and {AUDIT_AGAIN}"
        )
    measured = [rate.tpr for rate in rates if rate.tpr is not None]
    if not measured:
        return _Found(name, wanted.limit, None, f"too few documents: {rates[0].note.removeprefix('n/a: ')}")
    if compare == "value":
        return _Found(name, wanted.limit, max(measured, key=lambda tpr: tpr.value))
    note = f"the report has no interval that holds for the strongest attack's rate; {AUDIT_AGAIN}"
    return _Found(name, wanted.limit, None, note)


def _extractions(row: ModelAudit, limit: float) -> Iterator[_Found]:
    """Yield the shares of members and of canaries that come back, of which at least one must have been measured."""
    members = None if row.regurgitation is None else row.regurgitation.extracted_members
    canaries = None if row.canaries is None else row.canaries.extracted_included
    if members is not None:
        yield _Found("extracted members", limit, members)
    if canaries is not None:
        yield _Found("extracted canaries", limit, canaries)
    if members is canaries is None:
        yield _Found("extraction", limit, None, f"not measured: neither members nor canaries were tried; {AUDIT_AGAIN}")


def _epsilons(row: ModelAudit, limit: float, confidence: float) -> Iterator[GateCheck]:
    """Yield one check per bound, of which there is one per delta."""
    canaries = row.canaries
    if canaries is None or not canaries.epsilon:
        note = "not measured: no canaries; `dualtok prepare --canaries N` adds them before training"
        yield _cannot(row.name, "epsilon", limit, note, "low")
        return
    for bound in canaries.epsilon:
        name = f"epsilon, lower bound at delta {bound.delta:g}"
        reach = _largest_bound(bound, canaries.n_included + canaries.n_excluded, confidence)
        above = bound.epsilon > limit + ROUNDING
        if reach <= limit and not above:
            note = f"too few canaries: with every coin guessed right the bound would be {reach:.3g}"
            yield _cannot(row.name, name, limit, note, "low")
            continue
        yield GateCheck(
            model=row.name,
            figure=name,
            limit=limit,
            value=bound.epsilon,
            verdict="above" if above else "passed",
            reason="" if above else "a lower bound: no larger epsilon was shown, none was excluded",
            compared="low",
        )


def _largest_bound(bound: EpsilonBound, canaries: int, confidence: float) -> float:
    """Return the bound at delta 0 if all coins were guessed right.

    It is log(p / (1 - p)) with p = (alpha / tests)^(1 / coins); at a larger delta it is smaller.
    """
    p = ((1 - confidence) / max(bound.tests, 1)) ** (1 / max(canaries, 1))
    return max(0.0, math.log(p / (1 - p)))


def _unseen(row: ModelAudit, found: _Found, compare: Compared) -> str:
    """Return why a lower end below the limit says nothing: the audit would not have seen a leak of that size."""
    if compare != "low" or row.power is None or "AUC" not in found.name or row.power.auc <= found.limit + ROUNDING:
        return ""
    return f"too few documents: a leak below AUC {number(row.power.auc)} would not have been seen"


def _compare(model: str, found: _Found, compare: Compared, confidence: float, unseen: str = "") -> GateCheck:
    if found.estimate is None:
        return _cannot(model, found.name, found.limit, found.note, compare)
    share_of_none = found.limit == 0 and compare == "high"
    compared: Compared = "value" if share_of_none else compare
    value = float(getattr(found.estimate, compared))
    above = value > found.limit + ROUNDING
    few = "" if above else unseen or _too_few(found, compared, confidence)
    if few:
        return _cannot(model, found.name, found.limit, few, compared)
    reason = "a limit of 0 is compared with the figure itself" if share_of_none else found.note
    if above and compared == "high" and found.estimate.value <= found.limit + ROUNDING:
        reason = f"the figure itself, {number(found.estimate.value)}, is not: more documents narrow its interval"
    verdict: Verdict = "above" if above else "passed"
    return GateCheck(
        model=model,
        figure=found.name,
        limit=found.limit,
        value=value,
        verdict=verdict,
        reason=reason,
        compared=compared,
    )


def _too_few(found: _Found, compared: Compared, confidence: float) -> str:
    """Return why a share's upper end proves nothing: the exact one of 0 of so many documents lies above the limit.

    Resampling leaves a share of 0 without any width, however few documents there are (Clopper and Pearson 1934 have
    1 - (alpha / 2)^(1 / n) there).
    """
    if compared != "high" or not found.trials:
        return ""
    floor = 1 - ((1 - confidence) / 2) ** (1 / found.trials)
    if floor <= found.limit + ROUNDING:
        return ""
    return f"too few documents: if none of {found.trials} members is found, the rate may still be {number(floor)}"


def _cannot(model: str, figure: str, limit: float, reason: str, compared: Compared) -> GateCheck:
    return GateCheck(
        model=model, figure=figure, limit=limit, value=None, verdict="cannot be said", reason=reason, compared=compared
    )


def require_compared(name: str) -> Compared:
    """Return the name of what is to be compared.

    Raises:
        ConfigError: nothing is called so.
    """
    for known in COMPARED:
        if name == known:
            return known
    raise ConfigError(f"--compare {name!r}: must be one of {', '.join(get_args(Compared))}")
