"""Made-up figures of a small report, each as a test wants it."""

from __future__ import annotations

import math
from typing import Any

from dualtok.audit.report.base import Estimate
from dualtok.audit.report.data import (
    AttackResult,
    AuditReport,
    CanaryAudit,
    Checks,
    EpsilonBound,
    Exposures,
    ModelAudit,
    RocPoints,
    Strongest,
    StrongestTpr,
    TprAtFpr,
)
from dualtok.audit.report.details import Group, GroupAudit, Regurgitation
from dualtok.audit.report.gate import GateLimits, judge

SOUND = Checks(blind_auc=Estimate(value=0.5, low=0.4, high=0.6), duplicates=0, shared_passages=0)
MANY = 1000


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high)


def canaries(*epsilon: float, number: int = 200, extracted: Estimate | None = None, tests: int = 4) -> CanaryAudit:
    bounds = [
        EpsilonBound(delta=delta, epsilon=bound, label="Ref", guesses=number, correct=number, tests=tests)
        for bound, delta in zip(epsilon, (0.0, 1e-5), strict=False)
    ]
    return CanaryAudit(
        n_included=number // 2,
        n_excluded=number - number // 2,
        scores=[],
        epsilon=bounds,
        space_bits=20,
        candidates=100,
        ranked=Exposures(included=[], excluded=[]),
        extrapolated=Exposures(included=[], excluded=[]),
        extracted_included=extracted,
        extracted_excluded=None,
    )


def row(name: str = "dual", documents: int = MANY, **changes: Any) -> ModelAudit:
    """A model whose strongest attack has .55 [.5, .58], and 4 % [.02, .05] at 1 % false alarms; .001 cannot be had."""
    auc = estimate(0.55, 0.5, 0.57)
    rates = [
        TprAtFpr(target_fpr=0.01, tpr=estimate(0.03, 0.02, 0.04), attained_fpr=0.01),
        TprAtFpr(target_fpr=0.001, note=f"n/a: {documents} non-members, fewer than 1/0.001"),
    ]
    attack = AttackResult(
        name="ref", label="Ref", auc=auc, auc_two_sided=auc, tpr=rates, roc=RocPoints(fpr=[0, 1], tpr=[0, 1])
    )
    values: dict[str, Any] = {
        "n_members": documents,
        "n_non_members": documents,
        "perplexity_members": 10,
        "perplexity_non_members": 11,
        "loss_gap": 0.1,
        "attacks": [attack],
        "strongest": Strongest(label="Ref", auc_two_sided=estimate(0.55, 0.5, 0.58)),
        "strongest_tpr": [StrongestTpr(target_fpr=0.01, label="Ref", tpr=estimate(0.03, 0.02, 0.05))],
    }
    return ModelAudit(name=name, **{**values, **changes})


def report(*rows: ModelAudit, **changes: Any) -> AuditReport:
    return AuditReport(
        title="t", created="2025-01-02T03:04:05+00:00", **{"rows": rows or [row()], "checks": SOUND, **changes}
    )


def regurgitation(value: float, high: float) -> Regurgitation:
    share = estimate(value, 0, high)
    return Regurgitation(length=50, extracted_members=share, extracted_non_members=share)


COUNTS_OF_GROUPS = (
    "min_documents",
    "members_without_group",
    "non_members_without_group",
    "small_member_groups",
    "small_non_member_groups",
)


def groups_of(worst: float, strongest: float) -> GroupAudit:
    p_values = {"p_value": 0.5, "p_value_among_members": 0.5}
    group = Group(name="a", documents=9, label="Ref", auc=estimate(0.5, 0.4, max(worst, 0.5)), **p_values)
    whole = estimate(0.5, 0.5, max(strongest, 0.5))
    counts = dict.fromkeys(COUNTS_OF_GROUPS, 0) | {"member_groups": 9, "non_member_groups": 9, "attacks": 1}
    found = {"strongest_label": "Ref", "strongest": whole, "strongest_p_value": 0.5, "worst": group}
    return GroupAudit(field="person", **counts, **found)


def full_report() -> AuditReport:
    """A report with every optional part, a verdict and a diverged model."""
    whole = row(
        "whole",
        canaries=canaries(2, 1, extracted=estimate(0.1, 0, 0.2)),
        groups=groups_of(0.6, 0.6),
        regurgitation=regurgitation(0.1, 0.2),
    )
    made = report(whole, row("diverged", perplexity_members=math.inf, loss_gap=math.nan))
    return made.model_copy(update={"gate": judge(made, GateLimits(strongest_auc=0.58))})
