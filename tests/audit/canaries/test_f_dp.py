"""Bounds by privacy curves against linear programs, closed forms, a published figure and mechanisms of known mu."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from dualtok.audit.canaries.bounds import canary_bounds
from dualtok.audit.canaries.epsilon import epsilon_lower_bound, guess
from dualtok.audit.canaries.f_dp import (
    epsilon_delta_curve,
    fdp_epsilon_bound,
    fdp_mu_bound,
    gaussian_curve,
    gaussian_delta,
    gaussian_epsilon,
    independent_mu_bound,
    independent_p_value,
    refutes,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Curve = Callable[[float], float]

norm = scipy.stats.norm
cached_mu, cached_independent = lru_cache(None)(fdp_mu_bound), lru_cache(None)(independent_mu_bound)
cached_steinke = lru_cache(None)(epsilon_lower_bound)


def likeliest(m: int, r: int, v: int, curve: Curve) -> float:
    """Return an upper bound on P(v or more right) by Theorem 3.1 of Mahloujifar et al., by a linear program.

    The unknowns are p_0 to p_r. Each of the theorem's constraints, b >= curve(a) with a convex curve, is replaced by
    tangents of the curve, which it implies; many of them leave little more room than the curve.
    """
    count = np.arange(r + 1)
    rows, limits = [], []
    for i in range(r):
        a = np.where(count > i, count / m, 0.0)
        b = np.where(count >= i, (r - count) / m, 0.0)
        for y in np.concatenate([np.geomspace(1e-7, 0.01, 40), np.linspace(0.011, 0.999, 100)]):
            step = 1e-4 * min(y, 1 - y)
            slope = (curve(y + step) - curve(y - step)) / (2 * step)
            rows.append(slope * a - b)
            limits.append(slope * y - curve(y) + 1e-12)
    found = scipy.optimize.linprog(
        -(count >= v).astype(float), np.array(rows), limits, np.ones((1, r + 1)), [1.0], bounds=(0, 1), method="highs"
    )
    return float(-found.fun)


def smallest_refuted_level(m: int, r: int, v: int, curve: Curve) -> float:
    return float(scipy.optimize.bisect(lambda level: refutes(m, r, v, curve, level) - 0.5, 1e-9, 1 - 1e-9, xtol=1e-9))


@pytest.mark.parametrize(("m", "r", "v"), [(12, 12, 10), (30, 10, 10), (20, 8, 7), (15, 15, 15), (40, 12, 11)])
@pytest.mark.parametrize(
    "curve",
    [
        partial(epsilon_delta_curve, epsilon=0.0, delta=0.0),
        partial(epsilon_delta_curve, epsilon=0.7, delta=0.001),
        partial(gaussian_curve, mu=0.3),
        partial(gaussian_curve, mu=0.8),
    ],
)
def test_no_distribution_that_the_theorem_allows_exceeds_the_level(m: int, r: int, v: int, curve: Curve) -> None:
    level, allowed = smallest_refuted_level(m, r, v, curve), likeliest(m, r, v, curve)
    assert allowed <= level * 1.02 + 1e-6
    if r == v:  # the recursion loses nothing then
        assert allowed == pytest.approx(level, rel=0.05)
    assert allowed > level / 3


@pytest.mark.parametrize(("m", "guesses"), [(5, 5), (10, 10), (100, 100), (400, 100), (5000, 5000)])
def test_all_right_under_pure_privacy_is_the_binomial_bound(m: int, guesses: int) -> None:
    q = 0.05 ** (1 / guesses)
    closed = math.log(q / (1 - q))
    assert fdp_epsilon_bound(m, guesses, guesses) == pytest.approx(closed, abs=1e-5)
    assert fdp_epsilon_bound(m, guesses, guesses) == pytest.approx(epsilon_lower_bound(m, guesses, guesses), abs=1e-5)


@pytest.mark.parametrize(("r", "v"), [(100, 90), (1000, 690), (250, 230), (100, 60)])
def test_pure_privacy_is_never_bounded_better_than_exactly_and_little_worse(r: int, v: int) -> None:
    exact = epsilon_lower_bound(r, r, v)
    assert exact - 0.08 < fdp_epsilon_bound(r, r, v) <= exact + 1e-6


@pytest.mark.parametrize("mu", [0.0, 0.7, 2.0])
def test_all_canaries_guessed_is_a_binomial_of_the_total_variation(mu: float) -> None:
    right = norm.cdf(mu / 2)
    for v in (20, 35, 48):
        exact = scipy.stats.binom.sf(v - 1, 50, right)
        assert independent_p_value(50, 50, v, mu) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("m", "r", "v", "mu"), [(40, 10, 9, 1.0), (40, 10, 10, 2.0), (200, 30, 24, 0.5), (8, 7, 6, 1)])
def test_the_clearest_guesses_are_right_as_often_as_simulated(m: int, r: int, v: int, mu: float) -> None:
    rng = np.random.default_rng(0)
    coins = rng.random((40_000, m)) < 0.5
    distance = coins * mu + rng.normal(size=coins.shape) - mu / 2
    clearest = np.argpartition(-np.abs(distance), r - 1, axis=1)[:, :r]
    right = np.take_along_axis((distance > 0) == coins, clearest, axis=1).sum(axis=1)
    share = (right >= v).mean()
    assert independent_p_value(m, r, v, mu) == pytest.approx(share, abs=4 * math.sqrt(0.25 / len(coins)))


def test_the_authors_own_example_comes_out() -> None:
    """The documentation of their code bounds 364 wrong of 2500 guesses about 10,000 canaries at delta 1e-5."""
    mu = independent_mu_bound(10_000, 2500, 2500 - 364)
    assert gaussian_epsilon(mu, 1e-5) == pytest.approx(4.1371, abs=5e-5)
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.3772, abs=5e-5)


@pytest.mark.parametrize("mu", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0, 20.0])
def test_gaussian_delta_is_the_excess_of_one_density_over_the_other(mu: float, epsilon: float) -> None:
    x = np.linspace(-12, 16, 400_001)
    excess = np.maximum(norm.pdf(x - mu) - math.exp(epsilon) * norm.pdf(x), 0)
    integral = np.trapezoid(excess, x)
    assert gaussian_delta(mu, epsilon) == pytest.approx(integral, rel=1e-4, abs=1e-12)
    if 1e-9 < integral < gaussian_delta(mu, 0.0):
        assert gaussian_epsilon(mu, gaussian_delta(mu, epsilon)) == pytest.approx(epsilon, abs=1e-5)
    assert gaussian_epsilon(0.0, 1e-5) == 0


@pytest.mark.parametrize(("mu", "shown"), [(0.0, False), (1.0, True)])
def test_on_a_gaussian_mechanism_the_bounds_hold_and_those_that_know_its_curve_are_tighter(
    mu: float, shown: bool
) -> None:
    rng = np.random.default_rng(3)
    m, r, runs = 600, 60, 400
    right = []
    for _ in range(runs):
        coins = rng.random(m) < 0.5
        guesses = guess(coins * mu + rng.normal(size=m), r)
        right.append(int(np.count_nonzero(guesses == np.where(coins, 1, -1))))
    by_curve = np.array([cached_mu(m, r, v) for v in right])
    independent = np.array([cached_independent(m, r, v) for v in right])
    allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
    assert (by_curve > mu).mean() <= allowed
    assert (independent > mu).mean() <= allowed
    if shown:
        epsilon = [np.mean([gaussian_epsilon(bound, 1e-5) for bound in bounds]) for bounds in (by_curve, independent)]
        steinke = np.mean([cached_steinke(m, r, v, delta=1e-5) for v in right])
        truth = gaussian_epsilon(mu, 1e-5)
        assert steinke + 0.3 < epsilon[0] < epsilon[1] < truth
        assert (independent > 0.5).mean() > 0.9


def test_canaries_that_share_their_noise_break_the_bound_that_needs_independent_ones_and_not_the_other() -> None:
    """One likelihood ratio is drawn for all canaries and published, then each coin is told by randomised response.

    About one coin this says as much as a Gaussian mechanism of the same mu, whatever else is known.
    """
    rng = np.random.default_rng(4)
    m, mu, runs = 200, 1.0, 2000
    log_ratio = mu * np.abs(rng.normal(mu / 2, 1, runs))
    right = rng.binomial(m, 1 / (1 + np.exp(-log_ratio)))
    assert np.mean([cached_independent(m, m, int(v)) > mu for v in right]) > 0.3
    assert np.mean([cached_mu(m, m, int(v)) > mu for v in right]) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_bounds_fall_with_wrong_guesses_delta_and_confidence() -> None:
    for bound in (fdp_epsilon_bound, fdp_mu_bound, independent_mu_bound):
        by_correct = [bound(400, 100, correct) for correct in range(0, 101, 10)]
        assert by_correct == sorted(by_correct)
        assert by_correct[5] == 0 < by_correct[-1]
        assert bound(400, 100, 80, confidence=0.99) < bound(400, 100, 80, confidence=0.9)
        assert bound(400, 0, 0) == 0
    by_delta = [fdp_epsilon_bound(500, 500, 400, delta=delta) for delta in (0, 1e-4, 1e-2, 0.2, 1.0)]
    assert by_delta == sorted(by_delta, reverse=True)
    assert by_delta[-1] == 0


def test_a_large_delta_costs_the_curve_less_than_the_chosen_bound() -> None:
    assert fdp_epsilon_bound(10_000, 500, 450, delta=0.001) > epsilon_lower_bound(10_000, 500, 450, delta=0.001) + 0.3


def test_one_row_per_method_and_delta() -> None:
    rng = np.random.default_rng(5)
    coins = rng.random(200) < 0.5
    scores = {"Loss": rng.normal(size=200), "Ref": coins * 3 + rng.normal(size=200)}
    rows = canary_bounds(scores, coins, [50, 200], [0.0, 1e-5], 0.95)
    assert [(row.method, row.delta) for row in rows] == [
        ("steinke", 0),
        ("steinke", 1e-5),
        ("f_dp", 0),
        ("f_dp", 1e-5),
        ("f_dp_gaussian", 1e-5),
        ("independent_gaussian", 1e-5),
    ]
    assert {row.tests for row in rows} == {4}
    assert {row.label for row in rows} == {"Ref"}
    assert [row.mu is None for row in rows] == [True] * 4 + [False] * 2
    last = rows[-1]
    assert last.mu == pytest.approx(independent_mu_bound(200, last.guesses, last.correct, confidence=1 - 0.05 / 4))
    assert last.mu is not None
    assert last.epsilon == pytest.approx(gaussian_epsilon(last.mu, 1e-5))
    assert len(canary_bounds(scores, coins, [50], [0.0], 0.95)) == 2


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="0 <= v <= r <= m"):
        fdp_mu_bound(5, 6, 2)
    with pytest.raises(ValueError, match="level"):
        fdp_mu_bound(5, 5, 2, confidence=1.0)
    with pytest.raises(ValueError, match="delta"):
        fdp_epsilon_bound(5, 5, 2, delta=-0.1)
    with pytest.raises(ValueError, match="0 <= v <= r <= m"):
        independent_p_value(5, 5, 6, 1.0)
    with pytest.raises(ValueError, match="mu"):
        independent_p_value(5, 5, 4, -1.0)
    with pytest.raises(ValueError, match="confidence"):
        independent_mu_bound(5, 5, 4, confidence=0.0)
    with pytest.raises(ValueError, match="delta"):
        gaussian_epsilon(1.0, 0.0)
