"""The bound on epsilon against closed forms, sums of exact integers, and mechanisms whose epsilon is known."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest
import scipy.stats

from dualtok.audit.canaries.epsilon import best_bound, epsilon_lower_bound, guess, p_value

cached_bound = lru_cache(maxsize=None)(epsilon_lower_bound)


def exact_p_value(m: int, r: int, v: int, odds: Fraction, delta: Fraction) -> Fraction:
    """Return Theorem 5.2's bound in exact arithmetic, for e^epsilon = odds."""
    q = odds / (1 + odds)
    mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]

    def at_least(k: int) -> Fraction:
        return sum(mass[max(k, 0) :], Fraction(0))

    gain = max(((at_least(v - i) - at_least(v)) / i for i in range(1, m + 1)), default=Fraction(0))
    return min(Fraction(1), at_least(v) + 2 * m * delta * gain)


@pytest.mark.parametrize(("m", "r", "v"), [(12, 12, 9), (20, 8, 8), (9, 5, 0), (7, 0, 0), (15, 10, 1)])
@pytest.mark.parametrize("odds", [Fraction(1), Fraction(3), Fraction(9, 2)])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 1000), Fraction(1, 50)])
def test_the_p_value_is_that_of_the_theorem(m: int, r: int, v: int, odds: Fraction, delta: Fraction) -> None:
    expected = exact_p_value(m, r, v, odds, delta)
    assert p_value(m, r, v, math.log(odds), float(delta)) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(("r", "v"), [(100, 80), (1000, 560), (30, 29), (50, 33)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_without_delta_it_inverts_the_binomial_tail(r: int, v: int, confidence: float) -> None:
    # One-sided Clopper and Pearson: the lower limit of q is a quantile of a beta distribution.
    q = scipy.stats.beta.ppf(1 - confidence, v, r - v + 1)
    expected = max(0.0, math.log(q / (1 - q)))
    assert epsilon_lower_bound(2 * r, r, v, confidence=confidence) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("m", [5, 10, 100, 5000])
def test_all_right_has_a_closed_form(m: int) -> None:
    q = 0.05 ** (1 / m)
    assert epsilon_lower_bound(m, m, m) == pytest.approx(math.log(q / (1 - q)), rel=1e-9)


def test_it_falls_with_delta_and_with_wrong_guesses() -> None:
    by_delta = [epsilon_lower_bound(500, 500, 400, delta=delta) for delta in (0, 1e-6, 1e-4, 1e-2, 1.0)]
    assert by_delta == sorted(by_delta, reverse=True)
    assert by_delta[-1] == 0
    by_correct = [epsilon_lower_bound(500, 100, correct) for correct in range(0, 101, 10)]
    assert by_correct == sorted(by_correct)
    assert by_correct[5] == 0
    assert epsilon_lower_bound(500, 0, 0) == 0
    assert epsilon_lower_bound(10, 4, 4) == 0, "4 right guesses may be chance: 1/16"


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_the_bound_holds_for_randomised_response_and_nears_its_epsilon(epsilon: float) -> None:
    rng = np.random.default_rng(0)
    q = 1 / (1 + math.exp(-epsilon))
    bounds = np.array([cached_bound(400, 400, int(v)) for v in rng.binomial(400, q, 4000)])
    # 5 % of 4000 runs, and three standard deviations.
    assert (bounds > epsilon).mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)
    near = epsilon_lower_bound(200_000, 200_000, round(200_000 * q) + 1)
    assert epsilon - 0.1 < near <= epsilon or near == epsilon == 0


def released(rng: np.random.Generator, m: int, epsilon: float, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """Return coins and scores of a mechanism that gives each coin away with probability delta, else flips it."""
    coins = rng.random(m) < 0.5
    told = rng.random(m) < delta
    right = told | (rng.random(m) < 1 / (1 + math.exp(-epsilon)))
    return coins, np.where(coins == right, 1.0, -1.0) * np.where(told, 10, 1) + rng.normal(0, 0.1, m)


def test_with_delta_the_bound_holds_where_without_it_would_not() -> None:
    rng = np.random.default_rng(1)
    m, epsilon, delta = 2000, 0.5, 0.02
    with_delta, without = [], []
    for _ in range(300):
        coins, scores = released(rng, m, epsilon, delta)
        told = int(np.count_nonzero(np.abs(scores) > 5)) // 2
        correct = int(np.count_nonzero(guess(scores, told) == np.where(coins, 1, -1)))
        with_delta.append(cached_bound(m, told, correct, delta=delta) > epsilon)
        without.append(cached_bound(m, told, correct) > epsilon)
    assert np.mean(with_delta) <= 0.05
    assert np.mean(without) > 0.9


def test_the_choice_of_guesses_and_scores_is_paid_for() -> None:
    """Against coins that the scores know nothing of, more than 5 % of the runs would exceed 0 without correction."""
    rng = np.random.default_rng(2)
    corrected, uncorrected = [], []
    for _ in range(300):
        coins, scores = rng.random(150) < 0.5, rng.normal(size=(3, 150))
        guesses = [15, 38, 75, 150]
        corrected.append(best_bound(list(scores), coins, guesses, cached_bound)[1].value > 0)
        facts = np.where(coins, 1, -1)
        each = [cached_bound(150, r, int((guess(row, r) == facts).sum())) > 0 for row in scores for r in guesses]
        uncorrected.append(any(each))
    assert np.mean(corrected) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert np.mean(uncorrected) > 0.15
    which, bound = best_bound([np.zeros(150), coins.astype(float)], coins, [60], cached_bound)
    assert (which, bound.correct, bound.guesses) == (1, 60, 60)
    assert bound.value == pytest.approx(epsilon_lower_bound(150, 60, 60, confidence=0.975))


def test_guesses_are_of_the_ends_and_ties_keep_their_order() -> None:
    assert guess([0.3, -1, 5, 2, 0.1], 3).tolist() == [0, -1, 1, 1, 0]
    assert guess([0.0] * 4, 2).tolist() == [-1, 0, 0, 1]
    assert guess([1, 2], 0).tolist() == [0, 0]
    assert guess([-math.inf, 1, math.inf], 2).tolist() == [-1, 0, 1]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="0 <= v <= r <= m"):
        p_value(5, 6, 2, 1.0)
    with pytest.raises(ValueError, match="delta"):
        p_value(5, 5, 2, 1.0, 1.5)
    with pytest.raises(ValueError, match="confidence"):
        epsilon_lower_bound(5, 5, 2, confidence=1.0)
    with pytest.raises(ValueError, match="1 of them NaN"):
        guess([1.0, math.nan], 1)
    with pytest.raises(ValueError, match="at least one"):
        best_bound([], [True], [1], cached_bound)
