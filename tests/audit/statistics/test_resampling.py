"""Resampled figures: drawn, to the digit those of the bootstrap; from their laws, the same distribution."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtok.audit.statistics import resampling
from dualtok.audit.statistics.metrics import (
    auc_of_counts,
    bootstrap,
    percentile_interval,
    roc_auc,
    roc_curve,
    tpr_of_counts,
)
from dualtok.audit.statistics.resampling import resampled_figures

Pair = tuple[np.ndarray, np.ndarray]
SCORES = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=25)


def normal(seed: int, n: int, m: int, shift: float = 0.5) -> Pair:
    draw = np.random.default_rng(seed)
    return draw.normal(shift, 1, n), draw.normal(size=m)


def slow(pairs: list[Pair], fprs: list[float], resamples: int, seed: int) -> np.ndarray:
    statistics = [auc_of_counts, *(tpr_of_counts(fpr) for fpr in fprs)]
    return np.stack([bootstrap(*pair, statistics, resamples=resamples, seed=seed) for pair in pairs])


@pytest.mark.parametrize("digits", [1, 12])
@pytest.mark.parametrize("sizes", [(90, 130), (400, 300), (3, 5)])
def test_all_attacks_at_once_equal_the_bootstrap_of_each(sizes: tuple[int, int], digits: int) -> None:
    pairs = [tuple(scores.round(digits) for scores in normal(seed, *sizes)) for seed in range(3)]
    fprs = [0.5, 0.1, 0.01]
    np.testing.assert_array_equal(resampled_figures(pairs, fprs, resamples=350, seed=2), slow(pairs, fprs, 350, 2))


@settings(deadline=None)
@given(SCORES, SCORES, st.floats(0, 1))
def test_ties_and_any_rate_equal_the_bootstrap(members: list[float], non_members: list[float], fpr: float) -> None:
    pairs = [(np.array(members), np.array(non_members))]
    np.testing.assert_array_equal(resampled_figures(pairs, [fpr], resamples=20, seed=1), slow(pairs, [fpr], 20, 1))


def test_large_sums_and_many_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [normal(seed, 90, 60) for seed in range(2)]
    whole = resampled_figures(pairs, [0.1], resamples=100, seed=0)
    monkeypatch.setattr(resampling, "CELLS", 700)
    np.testing.assert_array_equal(resampled_figures(pairs, [0.1], resamples=100, seed=0), whole)
    # 2 n m beyond 2^31 needs wide sums; separated classes win every pair.
    n = 33_000
    ((auc, *_), *_) = resampled_figures([(np.full(n, 2.0), np.zeros(n))], [], resamples=2, seed=0, most_drawn=2 * n)
    np.testing.assert_array_equal(auc, 1.0)


@pytest.mark.parametrize("digits", [1, 12])
def test_figures_from_their_laws_are_distributed_like_drawn_ones(digits: int) -> None:
    pairs = [tuple(scores.round(digits) for scores in normal(seed, 900, 1100, 0.3 * seed)) for seed in range(3)]
    fprs, resamples = [0.1, 0.01], 3000
    drawn = resampled_figures(pairs, fprs, resamples=resamples, seed=0)
    laws = resampled_figures(pairs, fprs, resamples=resamples, seed=1, most_drawn=0)
    spread = drawn.std(axis=2)
    assert (np.abs(laws.mean(axis=2) - drawn.mean(axis=2)) < 5 * spread * np.sqrt(2 / resamples)).all()
    assert np.abs(laws.std(axis=2) / spread - 1).max() < 0.08
    for end in (0.025, 0.975):
        gap = np.quantile(laws, end, axis=2) - np.quantile(drawn, end, axis=2)
        assert (np.abs(gap) < 0.25 * spread + 1 / 900).all()


def test_few_bins_keep_the_auc_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held at the observed share of pairs won, even four bins give resamples about the exact AUC."""
    monkeypatch.setattr(resampling, "BINS", 4)
    for digits in (0, 12):
        pair = tuple(scores.round(digits) for scores in normal(0, 3000, 2000, 1.0))
        ((values,),) = resampled_figures([pair], [], resamples=4000, seed=0, most_drawn=0)
        assert values.mean() == pytest.approx(roc_auc(*pair), abs=4 * values.std() / np.sqrt(4000))
    # Of members above all non-members, and of one score alone.
    assert (resampled_figures([(np.ones(50), np.zeros(50))], [], resamples=5, seed=0, most_drawn=0) == 1).all()
    assert (resampled_figures([(np.ones(50), np.ones(50))], [], resamples=5, seed=0, most_drawn=0) == 0.5).all()


def test_intervals_from_the_laws_cover_the_truth_about_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "BINS", 64)
    auc = scipy.stats.norm.cdf(1 / np.sqrt(2))
    tpr = scipy.stats.norm.sf(scipy.stats.norm.isf(0.1) - 1)
    hits = np.zeros(2)
    audits = 300
    for seed in range(audits):
        pair = normal(seed, 500, 500, 1.0)
        ((aucs, tprs),) = resampled_figures([pair], [0.1], resamples=300, seed=seed, most_drawn=0)
        estimates = roc_auc(*pair), roc_curve(*pair).tpr_within(0.1)[0]
        for number, (values, estimate, truth) in enumerate(zip((aucs, tprs), estimates, (auc, tpr), strict=True)):
            low, high = percentile_interval(values, estimate, 0.95)
            hits[number] += low <= truth <= high
    assert (hits / audits >= 0.91).all()
    assert (hits / audits <= 0.98).all()


def test_a_rate_that_no_non_member_exceeds_finds_all_members() -> None:
    pair = normal(0, 40, 40)
    for most_drawn in (0, 100):
        assert (resampled_figures([pair], [1.0], resamples=5, seed=0, most_drawn=most_drawn)[0, 1] == 1).all()
