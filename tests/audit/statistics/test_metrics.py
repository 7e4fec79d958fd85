from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtok.audit.statistics.metrics import (
    ROUNDING,
    auc_of_counts,
    bootstrap,
    bootstrap_interval,
    corrected_deviations,
    percentile_interval,
    roc_auc,
    roc_curve,
    tpr_at_fpr,
    tpr_of_counts,
    two_sided,
    two_sided_interval,
)

# Few distinct values, so that ties are common; all are exact in float64.
SCORES = st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=25)
WIDE = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=25)


def test_auc_oracles() -> None:
    assert roc_auc([0, 4, 6, 7], [1, 2, 3, 5]) == 11 / 16
    assert roc_auc([1, 3], [0, 2]) == 0.75
    assert roc_auc([2, 3], [0, 1]) == 1.0
    assert roc_auc([0, 1], [2, 3]) == 0.0
    assert roc_auc([5, 5], [5]) == 0.5
    assert roc_auc([1, 2], [1, 2]) == 0.5
    assert roc_auc([np.inf], [-np.inf]) == 1.0


def test_roc_oracle_by_our_rule_not_the_hull() -> None:
    curve = roc_curve([1, 3], [0, 2])
    assert [curve.tpr_within(fpr)[0] for fpr in (0, 0.25, 0.5, 0.75, 1)] == [0.5, 0.5, 1, 1, 1]
    assert [curve.tpr_within(fpr)[1] for fpr in (0, 0.25, 0.5, 0.75, 1)] == [0, 0, 0.5, 0.5, 0.5]
    assert curve.fpr.tolist() == [0, 0, 0.5, 0.5, 1]
    assert curve.tpr.tolist() == [0, 0.5, 0.5, 1, 1]
    assert curve.thresholds.tolist() == [np.inf, 3, 2, 1, 0]


@settings(deadline=None)
@given(SCORES, SCORES)
def test_auc_is_the_share_of_pairs_won(members: list[float], non_members: list[float]) -> None:
    wins = [(m > n) + 0.5 * (m == n) for m in members for n in non_members]
    assert roc_auc(members, non_members) == pytest.approx(np.mean(wins), abs=1e-12)


@settings(deadline=None)
@given(WIDE, WIDE)
def test_auc_is_a_probability_and_antisymmetric(members: list[float], non_members: list[float]) -> None:
    auc = roc_auc(members, non_members)
    assert 0 <= auc <= 1
    assert roc_auc(non_members, members) == pytest.approx(1 - auc, abs=1e-12)
    assert roc_auc([-m for m in members], [-n for n in non_members]) == pytest.approx(1 - auc, abs=1e-12)
    assert 0.5 <= two_sided(auc) <= 1
    assert two_sided(auc) == pytest.approx(two_sided(roc_auc(non_members, members)), abs=1e-12)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_figures_depend_on_the_order_alone(members: list[float], non_members: list[float]) -> None:
    stretched = [np.exp(m) for m in members], [np.exp(n) for n in non_members]
    assert roc_auc(*stretched) == roc_auc(members, non_members)
    assert roc_curve(*stretched).tpr_within(0.3) == roc_curve(members, non_members).tpr_within(0.3)
    interval = bootstrap_interval(members, non_members, resamples=20)
    assert bootstrap_interval(*stretched, resamples=20) == interval


@settings(deadline=None)
@given(SCORES, SCORES, st.floats(0, 1))
def test_tpr_is_the_best_of_all_thresholds(members: list[float], non_members: list[float], fpr: float) -> None:
    best = (0.0, 0.0)
    for threshold in [np.inf, *members, *non_members]:
        rate = float(np.mean([n >= threshold for n in non_members]))
        tpr = float(np.mean([m >= threshold for m in members]))
        if rate * len(non_members) <= fpr * len(non_members) + ROUNDING and (tpr, -rate) > (best[0], -best[1]):
            best = (tpr, rate)
    assert roc_curve(members, non_members).tpr_within(fpr) == best


@pytest.mark.parametrize(("fpr", "expected"), [(0.1, (0.2, 0.1)), (0.3, (0.4, 0.3)), (0.35, (0.4, 0.3)), (1, (1, 1))])
def test_a_target_that_is_met_exactly_counts(fpr: float, expected: tuple[float, float]) -> None:
    # From the top: member, other, member, other, ... so that k false positives give a TPR of (k + 1) / 10.
    members, others = np.arange(10) + 0.5, np.arange(10.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tpr, attained = tpr_at_fpr(members, others, fpr)
    assert attained == pytest.approx(min(expected[1], 0.9))
    assert tpr == pytest.approx(expected[0])


def test_low_rates_are_refused_below_one_non_member_and_warned_about_below_ten() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 100), rng.normal(0, 1, 100)
    with pytest.raises(ValueError, match=r"0\.009 cannot be measured with 100 non-members"):
        tpr_at_fpr(members, others, 0.009)
    with pytest.raises(ValueError, match="cannot be measured"):
        tpr_at_fpr(members, others, 0)
    with pytest.raises(ValueError, match="cannot be measured"):
        tpr_at_fpr(members, others, 1.01)
    with pytest.warns(UserWarning, match="1 of 100 non-members"):
        tpr, attained = tpr_at_fpr(members, others, 0.01)
    threshold = np.sort(others)[-2]
    assert (tpr, attained) == (np.mean(members > threshold), 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tpr_at_fpr(members, others, 0.1)


@pytest.mark.parametrize("bad", [[], [np.nan, 1.0], [[1.0, 2.0]]])
def test_empty_and_nan_scores_are_refused(bad: list[float]) -> None:
    for function in (roc_auc, roc_curve, bootstrap_interval):
        with pytest.raises(ValueError, match="non_members"):
            function([1.0], bad)
        with pytest.raises(ValueError, match=r"^members"):
            function(bad, [1.0])


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0.6, 0.8), (0.6, 0.8)),
        ((0.2, 0.4), (0.6, 0.8)),
        ((0.4, 0.55), (0.5, 0.6)),
        ((0.45, 0.7), (0.5, 0.7)),
        ((0.5, 0.5), (0.5, 0.5)),
        ((0.0, 1.0), (0.5, 1.0)),
    ],
)
def test_two_sided_interval(interval: tuple[float, float], expected: tuple[float, float]) -> None:
    assert two_sided_interval(*interval) == pytest.approx(expected)


def test_two_sided_interval_refuses_an_upside_down_one() -> None:
    with pytest.raises(ValueError, match="upside down"):
        two_sided_interval(0.6, 0.4)


def test_two_sided_interval_is_not_biased_upward_as_the_bootstrapped_maximum_is() -> None:
    rng = np.random.default_rng(3)
    members, others = rng.normal(size=60), rng.normal(size=60)
    low, _ = two_sided_interval(*bootstrap_interval(members, others, resamples=500))
    aucs = bootstrap(members, others, [auc_of_counts], resamples=500)[0]
    assert low == 0.5 < np.quantile(np.maximum(aucs, 1 - aucs), 0.025)


@settings(deadline=None)
@given(SCORES, SCORES, st.integers(0, 9))
def test_the_interval_holds_the_estimate_and_stays_in_range(
    members: list[float], non_members: list[float], seed: int
) -> None:
    low, high = bootstrap_interval(members, non_members, resamples=50, seed=seed)
    assert 0 <= low <= roc_auc(members, non_members) + 1e-12
    assert roc_auc(members, non_members) - 1e-12 <= high <= 1
    tpr_low, tpr_high = bootstrap_interval(members, non_members, tpr_of_counts(0.3), resamples=50, seed=seed)
    assert 0 <= tpr_low <= roc_curve(members, non_members).tpr_within(0.3)[0] <= tpr_high <= 1


@settings(deadline=None)
@given(SCORES, SCORES, st.floats(0, 1))
def test_statistics_of_counts_equal_those_of_scores(members: list[float], non_members: list[float], fpr: float) -> None:
    levels = np.unique(members + non_members)
    counts = [np.array([[scores.count(level) for level in levels]]) for scores in (members, non_members)]
    assert auc_of_counts(*counts)[0] == pytest.approx(roc_auc(members, non_members), abs=1e-12)
    assert tpr_of_counts(fpr)(*counts)[0] == roc_curve(members, non_members).tpr_within(fpr)[0]


def test_bootstrap_equals_a_loop_over_resampled_scores() -> None:
    rng = np.random.default_rng(5)
    members, others = rng.normal(0.5, 1, 40).round(1), rng.normal(0, 1, 30).round(1)
    fast = bootstrap(members, others, [auc_of_counts, tpr_of_counts(0.1)], resamples=2000, seed=1)
    slow = []
    for _ in range(2000):
        a, b = rng.choice(members, 40), rng.choice(others, 30)
        slow.append((roc_auc(a, b), roc_curve(a, b).tpr_within(0.1)[0]))
    for fast_values, slow_values in zip(fast, np.array(slow).T, strict=True):
        assert fast_values.mean() == pytest.approx(slow_values.mean(), abs=0.01)
        assert fast_values.std() == pytest.approx(slow_values.std(), rel=0.08)


def test_bootstrap_is_seeded_and_pairs_attacks() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 50), rng.normal(0, 1, 50)
    first = bootstrap(members, others, [auc_of_counts], resamples=100, seed=4)
    np.testing.assert_array_equal(first, bootstrap(members, others, [auc_of_counts], resamples=100, seed=4))
    assert (first != bootstrap(members, others, [auc_of_counts], resamples=100, seed=5)).any()
    # Another attack with the same order of documents sees the same resamples.
    np.testing.assert_array_equal(
        first, bootstrap(members * 3 + 1, others * 3 + 1, [auc_of_counts], resamples=100, seed=4)
    )


def test_the_classes_are_drawn_independently() -> None:
    # With sorted scores, equal draws from both classes would move both the same way and hide most of the variance.
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.5, 1, 60), rng.normal(0, 1, 60)
    shuffled = bootstrap(members, others, [auc_of_counts], resamples=2000)
    in_order = bootstrap(np.sort(members), np.sort(others), [auc_of_counts], resamples=2000)
    assert in_order.std() == pytest.approx(shuffled.std(), rel=0.1)


def test_large_classes_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 50), rng.normal(0, 1, 70)
    whole = bootstrap(members, others, [auc_of_counts], resamples=100)
    monkeypatch.setattr("dualtok.audit.statistics.metrics.RESAMPLE_CELLS", 900)
    np.testing.assert_array_equal(bootstrap(members, others, [auc_of_counts], resamples=100), whole)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = scipy.stats.norm.cdf(1 / np.sqrt(2))  # AUC of N(1, 1) against N(0, 1)
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(300):
        low, high = bootstrap_interval(rng.normal(1, 1, 80), rng.normal(0, 1, 80), resamples=400, seed=seed)
        hits += low <= truth <= high
    assert 0.91 <= hits / 300 <= 0.98


def test_a_wider_confidence_gives_a_wider_interval_and_settings_are_checked() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(1, 1, 60), rng.normal(0, 1, 60)
    low, high = bootstrap_interval(*scores, confidence=0.8)
    wide_low, wide_high = bootstrap_interval(*scores, confidence=0.99)
    assert wide_low < low < high < wide_high
    with pytest.raises(ValueError, match="resamples 0"):
        bootstrap_interval(*scores, resamples=0)
    with pytest.raises(ValueError, match=r"confidence 1\.0"):
        bootstrap_interval(*scores, confidence=1.0)


def test_a_thousand_resamples_of_two_thousand_documents_take_under_a_few_seconds() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(1, 1, 1000), rng.normal(0, 1, 1000)
    start = time.process_time()
    low, high = bootstrap_interval(*scores, resamples=1000)
    assert time.process_time() - start < 5  # about 0.2 s
    assert low < roc_auc(*scores) < high


@settings(deadline=None)
@given(SCORES, SCORES, st.floats(0, 1))
def test_a_curve_without_its_straight_runs_gives_the_same_rates(
    members: list[float], non_members: list[float], fpr: float
) -> None:
    curve = roc_curve(members, non_members)
    assert curve.thinned(1000).tpr_within(fpr) == curve.tpr_within(fpr)


def test_a_thinned_curve_is_short_keeps_its_ends_and_lies_on_the_whole_one() -> None:
    rng = np.random.default_rng(0)
    curve = roc_curve(rng.normal(0.7, 1, 5000), rng.normal(0, 1, 5000))
    thin = curve.thinned(200, keep=[0.1, 0.01, 0.001])
    assert len(curve.fpr) == 10001
    assert 100 < len(thin.fpr) <= 205
    assert (thin.fpr[0], thin.tpr[0], thin.fpr[-1], thin.tpr[-1]) == (0, 0, 1, 1)
    points = set(zip(curve.fpr, curve.tpr, strict=True))
    assert set(zip(thin.fpr, thin.tpr, strict=True)) <= points
    for fpr in (0.1, 0.01, 0.001):
        assert thin.tpr_within(fpr) == curve.tpr_within(fpr)
    grid = np.geomspace(1e-3, 1, 50)
    gaps = [curve.tpr_within(fpr)[0] - thin.tpr_within(fpr)[0] for fpr in grid]
    assert min(gaps) >= 0
    assert max(gaps) < 0.02


def test_beyond_an_end_that_is_corrected_for_many_tests_lies_the_share_it_says() -> None:
    """On average over samples of 400 resamples; for 200 tests the end lies beyond all of them."""
    draw, estimate, deviation = np.random.default_rng(0), 0.5, 0.05
    for tests in (2, 5, 15, 200):
        tail = 0.025 / tests
        beyond = []
        for _ in range(3000):
            low, high = percentile_interval(draw.normal(estimate, deviation, 400), estimate, 0.95, tests=tests)
            ends = (low - estimate) / deviation, (estimate - high) / deviation
            beyond += [scipy.stats.norm.cdf(end) for end in ends]
        # Stretched ends move the mean of so skew a share more than it should; they must not be too close, by much.
        assert 0.9 * tail < np.mean(beyond) < (1.1 if tests < 10 else 1.6) * tail, tests
    values = draw.normal(estimate, deviation, 400)
    assert percentile_interval(values, estimate, 0.95, tests=1) == percentile_interval(values, estimate, 0.95)
    low, high = percentile_interval(values, estimate, 0.95, tests=15)
    wide = percentile_interval(values, estimate, 0.95, tests=15, widening=2.0)
    assert wide == pytest.approx((2 * low - estimate, 2 * high - estimate))


def test_ends_of_few_documents_lie_as_far_out_as_students_t_says() -> None:
    """The mean of 12 normal values, 15 tests: the usual ends leave out the truth more than twice as often."""
    n, tests, trials = 12, 15, 4000
    x = np.random.default_rng(0).normal(0.5, 0.02, (trials, n))
    resamples = np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), 600) / n
    missed = {None: 0, n: 0}
    for row, values in zip(x, x @ resamples.T, strict=True):
        for documents in missed:
            low, high = percentile_interval(values, row.mean(), 0.95, tests=tests, documents=documents)
            missed[documents] += not low <= 0.5 <= high
    # Still too often: the bootstrap's tails are short, and the fewer the documents, the shorter.
    assert missed[None] / trials > 2.5 * missed[n] / trials
    assert missed[n] / trials < 2.5 * 0.05 / tests
    assert corrected_deviations(0.95, 15, 10**6) == pytest.approx(corrected_deviations(0.95, 15), rel=1e-4)
    assert corrected_deviations(0.95, 1, 5) == pytest.approx(1.959964)
    assert percentile_interval(np.array([0.5, 0.6]), 0.55, 0.95, tests=15, documents=1) == (0.0, 1.0)
