"""Tests on collections: p-values that are uniform where nothing is given away, and small where much is."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from dualtok.audit.statistics.collection import collection_tests, holm, learned_scores, mean_difference_p_value

TRIALS = 300


def is_uniform(p_values: list[float]) -> None:
    low, high = scipy.stats.binom.ppf([0.001, 0.999], len(p_values), 0.05)
    assert low <= sum(p_value <= 0.05 for p_value in p_values) <= high
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_p_values_are_uniform_without_a_difference() -> None:
    p_values = []
    for trial in range(TRIALS):
        draw = np.random.default_rng(trial)
        (test,) = collection_tests(draw.normal(size=60), draw.normal(size=60), [20], seed=trial, permutations=199)
        assert (test.size, test.collections) == (20, 3)
        p_values.append(test.p_value)
    is_uniform(p_values)


def test_p_values_of_learned_scores_are_uniform_where_there_is_nothing_to_learn() -> None:
    p_values = []
    for trial in range(TRIALS):
        draw = np.random.default_rng(trial)
        scores = learned_scores(draw.normal(size=(40, 12)), draw.normal(size=(40, 12)), seed=trial)
        (test,) = collection_tests(*scores, [20], seed=trial, permutations=199)
        p_values.append(test.p_value)
    is_uniform(p_values)


def test_a_finite_pool_does_not_make_a_model_look_guilty() -> None:
    """Two pools differ by chance; the share of disjoint collections that are rejected must not grow with that."""
    found, tested, held = 0.0, 0, []
    for trial in range(25):
        draw = np.random.default_rng(trial)
        (test,) = collection_tests(draw.normal(size=200), draw.normal(size=200), [10], seed=trial, permutations=199)
        found, tested = found + test.rejected * test.collections, tested + test.collections
        held.append(test.rejected_low <= 0.05 <= test.rejected_high)
    low, high = scipy.stats.binom.ppf([0.001, 0.999], tested, 0.05)
    assert low <= found <= high
    assert np.mean(held) > 0.85


def test_a_weak_hint_per_document_is_certain_in_a_large_collection() -> None:
    draw = np.random.default_rng(0)
    members, others = draw.normal(0.4, 1, 1200), draw.normal(size=1200)
    small, large, all_of_them = collection_tests(members, others, [10, 100, 600], seed=0)
    assert small.rejected < 0.4
    assert large.rejected > 0.6
    assert all_of_them.p_value <= 0.002
    assert [test.size for test in collection_tests(members, others[:50], [10, 100], seed=0)] == [10]


def test_either_direction_counts() -> None:
    draw = np.random.default_rng(0)
    (test,) = collection_tests(draw.normal(-1, 1, 100), draw.normal(size=100), [100], seed=0)
    assert test.p_value <= 0.002


def test_what_was_learned_is_judged_on_other_documents() -> None:
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(400, 30))
    inside, outside = learned_scores(noise[:200], noise[200:], seed=0)
    assert (len(inside), len(outside)) == (100, 100)
    assert scipy.stats.ttest_ind(inside, outside).pvalue > 0.01
    hint = noise.copy()
    hint[:200, 3] += 1.0
    assert scipy.stats.ttest_ind(*learned_scores(hint[:200], hint[200:], seed=0)).pvalue < 1e-6


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("digits", [0, 12])
@pytest.mark.parametrize("sizes", [(10, 10), (4, 9), (40, 25), (6, 6), (2, 2)])
def test_a_p_value_is_that_of_scipys_permutation_test(sizes: tuple[int, int], digits: int) -> None:
    """To the digit, from the same draws; few documents are permuted in all ways."""

    def difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(x, axis=axis) - np.mean(y, axis=axis)

    for seed in range(5):
        draw = np.random.default_rng(seed)
        pair = [draw.normal(size=size).round(digits) for size in sizes]
        ours, theirs = np.random.default_rng(seed), np.random.default_rng(seed)
        for _ in range(2):  # the second begins where the first left the generator
            expected = scipy.stats.permutation_test(pair, difference, n_resamples=999, vectorized=True, rng=theirs)
            assert mean_difference_p_value(*pair, 999, ours) == expected.pvalue


def test_a_sample_of_many_documents_is_learned_from_and_the_rest_is_still_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = np.random.default_rng(0)
    members, others = draw.normal(0.5, 1, (300, 3)), draw.normal(size=(300, 3))
    every = learned_scores(members, others, seed=0)
    monkeypatch.setattr("dualtok.audit.statistics.collection.MOST_LEARNED", 60)
    few = learned_scores(members, others, seed=0)
    assert [len(scores) for scores in few] == [len(scores) for scores in every] == [150, 150]
    assert (few[0] != every[0]).all()
    assert scipy.stats.ttest_ind(*few).pvalue < 1e-6
