"""One model's figures as a list of named numbers with intervals, for formats that know no attacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dualtok.audit.report.base import Estimate
    from dualtok.audit.report.data import CanaryAudit, ModelAudit

BOTH = "members against non-members"


@dataclass(frozen=True)
class Metric:
    """A figure of one model."""

    kind: str
    """What is measured, as an identifier: ``membership_inference_auc``."""
    name: str
    """The same in words."""
    value: float
    low: float | None = None
    """Lower end of its interval; None if there is no interval."""
    high: float | None = None
    """Upper end; None if there is none, as for a lower bound."""
    slice: str = BOTH
    """Documents that it is a figure of, and by which attack."""


def headline_metrics(row: ModelAudit) -> list[Metric]:
    """Return the figures that a reader who knows one of them wants: of the strongest attack, extraction, perplexity."""
    return [*_strongest(row), *_extraction(row), *_canaries(row.canaries), *_perplexities(row)]


def all_metrics(row: ModelAudit) -> list[Metric]:
    """Return every figure with an interval, attack by attack, and the perplexities."""
    return [*headline_metrics(row), *_groups(row), *_attacks(row)]


def _measured(kind: str, name: str, found: Estimate, of: str = BOTH) -> Metric:
    return Metric(kind, name, found.value, found.low, found.high, of)


def _strongest(row: ModelAudit) -> Iterator[Metric]:
    among = f"strongest of {len(row.attacks)}"
    best = row.strongest
    yield _measured(
        "membership_inference_auc",
        f"membership inference AUC ({among})",
        best.auc_two_sided,
        f"{BOTH}, {best.label}, two-sided; the interval is corrected for the number of attacks",
    )
    for rate in row.strongest_tpr:
        yield _measured(
            f"membership_inference_tpr_at_{rate.target_fpr:g}_fpr",
            f"membership inference TPR at {100 * rate.target_fpr:g} % FPR ({among})",
            rate.tpr,
            f"{BOTH}, {rate.label}; the interval is corrected for the number of attacks",
        )


def _extraction(row: ModelAudit) -> Iterator[Metric]:
    found = row.regurgitation
    if found is not None:
        name = f"documents with {found.length} tokens given back word for word"
        yield _measured("extraction_rate", name, found.extracted_members, "members")
        yield _measured("extraction_rate", name, found.extracted_non_members, "non-members")


def _canaries(canaries: CanaryAudit | None) -> Iterator[Metric]:
    if canaries is None:
        return
    shares = {"included": canaries.extracted_included, "left out": canaries.extracted_excluded}
    for side, share in shares.items():
        if share is not None:
            yield _measured("canary_extraction_rate", "canaries given back word for word", share, f"canaries {side}")
    for score in canaries.scores:
        if score.auc is not None:
            of = f"canaries included against those left out, {score.label}"
            yield _measured("canary_auc", "AUC of canaries", score.auc, of)
    for bound in canaries.epsilon:
        name = f"epsilon is at least, at delta {bound.delta:g}"
        of = f"canaries, {bound.label}: {bound.correct} of {bound.guesses} guesses right"
        yield Metric("epsilon_lower_bound", name, bound.epsilon, bound.epsilon, None, of)


def _perplexities(row: ModelAudit) -> Iterator[Metric]:
    yield Metric("perplexity", "perplexity", row.perplexity_non_members, slice="non-members")
    yield Metric("perplexity", "perplexity", row.perplexity_members, slice="members")
    yield Metric("loss_gap", "loss of non-members minus that of members, nats per token", row.loss_gap)


def _groups(row: ModelAudit) -> Iterator[Metric]:
    groups = row.groups
    if groups is not None:
        whole = f"all documents of one {groups.field}, {groups.strongest_label}; corrected for the number of attacks"
        worst = f"the {groups.field} that is told best, {groups.worst.label}; corrected for choosing it and the attack"
        yield _measured("group_membership_inference_auc", "membership inference AUC of groups", groups.strongest, whole)
        yield _measured("worst_group_auc", "membership inference AUC of the worst group", groups.worst.auc, worst)


def _attacks(row: ModelAudit) -> Iterator[Metric]:
    for attack in row.attacks:
        of = f"{BOTH}, {attack.label}"
        yield _measured("attack_auc", f"AUC of {attack.label}, one-sided", attack.auc, of)
        for rate in attack.tpr:
            if rate.tpr is not None:
                name = f"TPR of {attack.label} at {100 * rate.target_fpr:g} % FPR"
                yield _measured(f"attack_tpr_at_{rate.target_fpr:g}_fpr", name, rate.tpr, of)
