"""From the signals of one model to its row of the report."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.base import ATTACKS, AttackContext
from dualtok.audit.attacks.crossfit import FEWEST
from dualtok.audit.attacks.registry import attack_scores
from dualtok.audit.report.base import Estimate
from dualtok.audit.report.data import (
    AttackResult,
    Collections,
    ModelAudit,
    RocPoints,
    Strongest,
    TokenHistogram,
    TprAtFpr,
)
from dualtok.audit.settings import AuditConfig
from dualtok.audit.signals.ragged import ROUNDING
from dualtok.audit.statistics.checks import strongest_p_value
from dualtok.audit.statistics.collection import collection_tests, holm, learned_scores
from dualtok.audit.statistics.metrics import (
    FEW_FALSE_POSITIVES,
    auc_of_counts,
    bootstrap,
    percentile_interval,
    roc_auc,
    roc_curve,
    tpr_of_counts,
    two_sided,
    two_sided_interval,
)
from dualtok.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dualtok.audit.attacks.base import PairOfScores
    from dualtok.audit.attacks.registry import Scored
    from dualtok.audit.signals.signals import Signals
    from dualtok.audit.statistics.groups import DocumentGroups

# The same bins for every model, in nats, so that panels can be compared; a bin's edge lies on 0, the threshold tau.
CALIBRATED_EDGES = np.linspace(-8.0, 8.0, 65)


def choose_documents(documents: Sequence[int] | NDArray[np.int64], limit: int | None, seed: int) -> NDArray[np.int64]:
    """Return at most ``limit`` of the ids, ascending: a uniform sample that the set of ids and the seed decide."""
    pool = np.unique(np.asarray(documents, dtype=np.int64))
    if limit is None or len(pool) <= limit:
        return pool
    return np.sort(np.random.default_rng(seed).choice(pool, size=limit, replace=False))


def audit_model(
    name: str,
    members: Signals,
    non_members: Signals,
    *,
    member_context: AttackContext | None = None,
    non_member_context: AttackContext | None = None,
    config: AuditConfig | None = None,
    step: int | None = None,
    groups: DocumentGroups | None = None,
) -> ModelAudit:
    """Run every attack of ``config`` on one model and state what it gives away.

    Args:
        name: the row's name in the report, e.g. "plain, last".
        members: the model's signals over documents it was trained on.
        non_members: the same over documents of the same distribution that it was not trained on.
        member_context: what the attacker has for the members; an attack is run if both contexts have what it needs.
        non_member_context: the same for the non-members.
        config: settings; its ``min_k_share`` and ``con_recall_gamma`` take the place of the contexts'.
        step: training step of the model, if it is one of several.
        groups: whose each document is, for ``config.group_field``.

    Raises:
        DataError: no document of a class can be scored, a context does not fit the documents, or groups cannot be
            audited (:func:`.groups.require_groups`).
    """
    config = config or AuditConfig()
    targets = members.with_tokens(), non_members.with_tokens()
    for target, kind in zip(targets, ("members", "non-members"), strict=True):
        if target.n_documents == 0:
            raise DataError(f"audit of {name!r}: no {kind} with at least two tokens; give more or longer documents")
    contexts = _with_settings(member_context, config), _with_settings(non_member_context, config)
    available = contexts[0].has & contexts[1].has
    scored = attack_scores(targets, contexts, config.attacks, config.seed)
    scores = scored.scores
    if not scores:
        raise DataError(f"audit of {name!r}: none of the attacks {list(config.attacks)} can run; add 'loss'")
    outcomes = [_result(attack, pair, config, len(scores)) for attack, pair in scores.items()]
    widening = {attack: ATTACKS[attack].widening for attack in scores}
    return ModelAudit(
        name=name,
        step=step,
        n_members=targets[0].n_documents,
        n_non_members=targets[1].n_documents,
        members_left_out=members.n_documents - targets[0].n_documents,
        non_members_left_out=non_members.n_documents - targets[1].n_documents,
        perplexity_members=targets[0].perplexity,
        perplexity_non_members=targets[1].perplexity,
        loss_gap=_token_mean_loss(targets[1]) - _token_mean_loss(targets[0]),
        attacks=[result for result, _ in outcomes],
        not_run=scored.not_run,
        strongest=_strongest(outcomes),
        strongest_p_value=strongest_p_value(
            scores, permutations=config.permutations, seed=config.seed, widening=widening
        ),
        collections=_collections(scored, config),
        calibrated=_calibrated(targets, contexts) if "reference" in available else None,
        groups=None if groups is None else groups.audit(scores, (targets[0].document, targets[1].document), config),
    )


def _with_settings(context: AttackContext | None, config: AuditConfig) -> AttackContext:
    """Return a context with the settings' shares in place of its own."""
    return dataclasses.replace(
        context or AttackContext(), min_k_share=config.min_k_share, con_recall_gamma=config.reruns.con_recall_gamma
    )


def _token_mean_loss(target: Signals) -> float:
    return -float(np.mean(target.log_prob, dtype=np.float64))


def _collections(scored: Scored, config: AuditConfig) -> list[Collections]:
    """Test collections by the Ref attack (or the first there is), and by what was learned on half of the documents."""
    name = "ref" if "ref" in scored.scores else next(iter(scored.scores))
    named = {ATTACKS[name].label: scored.scores[name]}
    if min(map(len, scored.features)) >= FEWEST:
        named["learned"] = learned_scores(*scored.features, config.seed)
    found = [
        (label, test)
        for label, pair in named.items()
        for test in collection_tests(*pair, config.collections, config.seed)
    ]
    together = holm([test.p_value for _, test in found])
    return [
        Collections(label=label, p_holm=p_holm, **dataclasses.asdict(test))
        for (label, test), p_holm in zip(found, together, strict=True)
    ]


def _result(name: str, scores: PairOfScores, config: AuditConfig, n_attacks: int) -> tuple[AttackResult, Estimate]:
    """Return an attack's result, and its two-sided AUC with the interval that holds for ``n_attacks`` at once."""
    n_non_members = len(scores[1])
    measurable = [fpr for fpr in config.fpr_targets if fpr * n_non_members >= 1 - ROUNDING]
    draws = bootstrap(
        *scores,
        [auc_of_counts, *(tpr_of_counts(fpr) for fpr in measurable)],
        resamples=config.bootstrap_resamples,
        seed=config.seed,
    )
    auc = roc_auc(*scores)
    widening = ATTACKS[name].widening
    low, high = percentile_interval(draws[0], auc, config.confidence, widening=widening)
    curve = roc_curve(*scores)
    rates = []
    for fpr in config.fpr_targets:
        if fpr not in measurable:
            note = f"n/a: {n_non_members} non-members, fewer than 1/{fpr:g}"
            rates.append(TprAtFpr(target_fpr=fpr, note=note))
            continue
        tpr, attained = curve.tpr_within(fpr)
        ends = percentile_interval(draws[1 + measurable.index(fpr)], tpr, config.confidence, widening=widening)
        coarse = fpr * n_non_members < FEW_FALSE_POSITIVES - ROUNDING
        rates.append(
            TprAtFpr(
                target_fpr=fpr,
                tpr=Estimate(value=tpr, low=ends[0], high=ends[1]),
                attained_fpr=attained,
                note=f"coarse: fewer than {FEW_FALSE_POSITIVES} false positives are allowed" if coarse else "",
            )
        )
    drawn = curve.thinned(keep=measurable)
    result = AttackResult(
        name=name,
        label=ATTACKS[name].label,
        auc=Estimate(value=auc, low=low, high=high),
        auc_two_sided=_two_sided(auc, low, high),
        tpr=rates,
        roc=RocPoints(fpr=drawn.fpr.tolist(), tpr=drawn.tpr.tolist()),
    )
    corrected = percentile_interval(draws[0], auc, 1 - (1 - config.confidence) / n_attacks, widening=widening)
    return result, _two_sided(auc, *corrected)


def _two_sided(auc: float, low: float, high: float) -> Estimate:
    ends = two_sided_interval(low, high)
    return Estimate(value=two_sided(auc), low=ends[0], high=ends[1])


def _strongest(outcomes: Sequence[tuple[AttackResult, Estimate]]) -> Strongest:
    """Return the best attack; when all intervals hold at once, the maximum lies between their highest ends."""
    best = max(outcomes, key=lambda outcome: outcome[1].value)
    estimate = Estimate(
        value=best[1].value,
        low=max(corrected.low for _, corrected in outcomes),
        high=max(corrected.high for _, corrected in outcomes),
    )
    return Strongest(label=best[0].label, auc_two_sided=estimate)


def _calibrated(targets: tuple[Signals, Signals], contexts: tuple[AttackContext, AttackContext]) -> TokenHistogram:
    counts, means = [], []
    for target, context in zip(targets, contexts, strict=True):
        s = context.reference_for(target).log_prob.astype(np.float64) - target.log_prob
        inside = np.clip(s, CALIBRATED_EDGES[0], CALIBRATED_EDGES[-1])
        counts.append(np.histogram(inside, CALIBRATED_EDGES)[0].tolist())
        means.append(float(s.mean()))
    return TokenHistogram(
        edges=CALIBRATED_EDGES.tolist(),
        members=counts[0],
        non_members=counts[1],
        mean_members=means[0],
        mean_non_members=means[1],
    )
