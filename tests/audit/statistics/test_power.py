"""The smallest leak that an audit would have seen, against audits with intervals from the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from dualtok.audit.attacks.crossfit import WIDENING
from dualtok.audit.statistics.metrics import percentile_interval, roc_auc
from dualtok.audit.statistics.power import PROBABILITY, SIMULATIONS, audit_power, smallest_auc
from dualtok.audit.statistics.resampling import resampled_figures

DEVIATIONS = float(scipy.stats.norm.isf(0.025))


@pytest.mark.parametrize("attacks", [1, 10])
@pytest.mark.parametrize("widening", [1.0, WIDENING])
def test_audits_of_a_leak_that_large_see_it_in_four_of_five(attacks: int, widening: float) -> None:
    """300 audits, whose intervals come from the bootstrap and know nothing of the formula."""
    draw, n, m, audits = np.random.default_rng(0), 70, 90, 300
    confidence = 1 - 0.05 / attacks
    deviations = widening * float(scipy.stats.norm.isf((1 - confidence) / 2))
    auc = smallest_auc(draw.normal(size=2000), n, m, deviations=deviations, seed=1)
    shift = np.sqrt(2) * scipy.stats.norm.ppf(auc)
    seen = 0
    for seed in range(audits):
        pair = draw.normal(shift, 1, n), draw.normal(size=m)
        ((values,),) = resampled_figures([pair], [], resamples=400 if attacks == 1 else 1000, seed=seed)
        low, _ = percentile_interval(values, roc_auc(*pair), confidence, widening=widening)
        seen += low > 0.5
    # Three deviations of the audits', and of the simulations' own share.
    slack = 3 * np.sqrt(PROBABILITY * (1 - PROBABILITY) * (1 / audits + 1 / SIMULATIONS))
    assert abs(seen / audits - PROBABILITY) < slack


def test_it_agrees_with_the_normal_law_of_many_documents() -> None:
    n = 20_000
    auc = smallest_auc(np.random.default_rng(0).normal(size=n), n, n, deviations=DEVIATIONS, seed=0)
    deviation = np.sqrt(2 * n / (12 * n * n))  # of the AUC where nothing is given away
    assert auc - 0.5 == pytest.approx((DEVIATIONS + scipy.stats.norm.ppf(PROBABILITY)) * deviation, abs=0.002)


def test_more_documents_see_less_and_wider_intervals_see_more() -> None:
    pool = np.random.default_rng(0).normal(size=400)
    few, some, many = (smallest_auc(pool, n, n, deviations=DEVIATIONS, seed=0) for n in (20, 100, 1000))
    assert 0.5 < many < some < few < 1
    assert smallest_auc(pool, 100, 100, deviations=2 * DEVIATIONS, seed=0) > some + 0.03
    assert smallest_auc(pool, 1, 1, deviations=DEVIATIONS, seed=0) <= 1
    for strange in (np.zeros(100), np.array([-np.inf, np.nan, 3.0]), np.array([0.0] * 50 + [1.0] * 50)):
        assert 0.5 < smallest_auc(strange, 100, 100, deviations=DEVIATIONS, seed=0) <= 1
    scaled = smallest_auc(1000 * pool + 7, 100, 100, deviations=DEVIATIONS, seed=0)
    assert scaled == pytest.approx(some, abs=2e-3)


def test_an_audit_states_it_for_the_attack_with_the_widest_intervals() -> None:
    draw = np.random.default_rng(0)
    scores = {name: (draw.normal(size=80), draw.normal(size=80)) for name in ("loss", "ref_forest")}
    fixed = audit_power(scores, {"loss": 1.0, "ref_forest": 1.0}, confidence=0.95, seed=0)
    wide = audit_power(scores, {"loss": 1.0, "ref_forest": WIDENING}, confidence=0.95, seed=0)
    assert (wide.probability, wide.simulations) == (PROBABILITY, SIMULATIONS)
    assert wide.auc > fixed.auc + 0.02
    alone = audit_power({"loss": scores["loss"]}, {"loss": 1.0}, confidence=0.95, seed=0)
    assert alone.auc < fixed.auc
