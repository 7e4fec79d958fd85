"""From the scores of all attacks on a model to their figures with intervals, and to the strongest of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dualtok.audit.attacks.base import attack_of
from dualtok.audit.report.base import Estimate
from dualtok.audit.report.data import AttackResult, RocPoints, Strongest, StrongestTpr, TprAtFpr
from dualtok.audit.signals.ragged import ROUNDING
from dualtok.audit.statistics.metrics import (
    FEW_FALSE_POSITIVES,
    percentile_interval,
    roc_auc,
    roc_curve,
    two_sided,
    two_sided_interval,
)
from dualtok.audit.statistics.resampling import resampled_figures

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from dualtok.audit.attacks.base import PairOfScores
    from dualtok.audit.settings import AuditConfig

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """One attack's result, and the intervals that hold for all attacks at once."""

    result: AttackResult
    auc_two_sided: Estimate
    tpr: dict[float, Estimate]
    """By target false-positive rate, those that can be measured."""


def attack_outcomes(scores: Mapping[str, PairOfScores], config: AuditConfig) -> list[Outcome]:
    """Return every attack's figures.

    Args:
        scores: attack -> scores of members and of non-members, the same documents in each.
        config: false-positive rates, confidence, resamples, seed.
    """
    n_non_members = len(next(iter(scores.values()))[1])
    measurable = [fpr for fpr in config.fpr_targets if fpr * n_non_members >= 1 - ROUNDING]
    draws = resampled_figures(list(scores.values()), measurable, resamples=config.bootstrap_resamples, seed=config.seed)
    return [
        _outcome(name, pair, drawn, measurable, config=config, n_attacks=len(scores))
        for (name, pair), drawn in zip(scores.items(), draws, strict=True)
    ]


def _outcome(
    name: str, scores: PairOfScores, draws: Floats, measurable: Sequence[float], *, config: AuditConfig, n_attacks: int
) -> Outcome:
    n_non_members, widening = len(scores[1]), attack_of(name).widening
    together = 1 - (1 - config.confidence) / n_attacks

    def estimate(values: Floats, value: float, confidence: float) -> Estimate:
        low, high = percentile_interval(values, value, confidence, widening=widening)
        return Estimate(value=value, low=low, high=high)

    auc = roc_auc(*scores)
    own, corrected = (estimate(draws[0], auc, confidence) for confidence in (config.confidence, together))
    curve = roc_curve(*scores)
    rates, corrected_rates = [], {}
    for fpr in config.fpr_targets:
        if fpr not in measurable:
            note = f"n/a: {n_non_members} non-members, fewer than 1/{fpr:g}"
            rates.append(TprAtFpr(target_fpr=fpr, note=note))
            continue
        tpr, attained = curve.tpr_within(fpr)
        values = draws[1 + measurable.index(fpr)]
        coarse = fpr * n_non_members < FEW_FALSE_POSITIVES - ROUNDING
        note = f"coarse: fewer than {FEW_FALSE_POSITIVES} false positives are allowed" if coarse else ""
        interval = estimate(values, tpr, config.confidence)
        rates.append(TprAtFpr(target_fpr=fpr, tpr=interval, attained_fpr=attained, note=note))
        corrected_rates[fpr] = estimate(values, tpr, together)
    drawn = curve.thinned(keep=measurable)
    result = AttackResult(
        name=name,
        label=attack_of(name).label,
        auc=own,
        auc_two_sided=_two_sided(own),
        tpr=rates,
        roc=RocPoints(fpr=drawn.fpr.tolist(), tpr=drawn.tpr.tolist()),
    )
    return Outcome(result, _two_sided(corrected), corrected_rates)


def _two_sided(auc: Estimate) -> Estimate:
    low, high = two_sided_interval(auc.low, auc.high)
    return Estimate(value=two_sided(auc.value), low=low, high=high)


def strongest(outcomes: Sequence[Outcome]) -> Strongest:
    """Return the best attack; when all intervals hold at once, the maximum lies between their highest ends."""
    label, estimate = _highest([(outcome.result.label, outcome.auc_two_sided) for outcome in outcomes])
    return Strongest(label=label, auc_two_sided=estimate)


def strongest_tpr(outcomes: Sequence[Outcome]) -> list[StrongestTpr]:
    """Return the best true-positive rate of all attacks at each false-positive rate that can be measured."""
    found = []
    for fpr in outcomes[0].tpr:
        label, estimate = _highest([(outcome.result.label, outcome.tpr[fpr]) for outcome in outcomes])
        found.append(StrongestTpr(target_fpr=fpr, label=label, tpr=estimate))
    return found


def _highest(estimates: Sequence[tuple[str, Estimate]]) -> tuple[str, Estimate]:
    """Return the label and value of the greatest estimate, between the highest ends of all."""
    label, best = max(estimates, key=lambda pair: pair[1].value)
    low = max(estimate.low for _, estimate in estimates)
    return label, Estimate(value=best.value, low=low, high=max(estimate.high for _, estimate in estimates))
