"""Exposure against brute force and against quantiles that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from dualtok.audit.canaries.exposure import extrapolated_exposure, fit_skew_normal, ranked_exposure, skew_normal_log_cdf


def test_with_all_secrets_it_is_the_definition() -> None:
    rng = np.random.default_rng(0)
    space = rng.integers(0, 40, 100).astype(float)  # with ties
    for own in range(100):
        rank = sorted(space.tolist()).index(space[own]) + np.count_nonzero(space == space[own])
        others = np.delete(space, own)[None]
        assert ranked_exposure([space[own]], others)[0] == pytest.approx(math.log2(100) - math.log2(rank))


def test_a_sample_estimates_the_exposure_of_the_whole_space() -> None:
    rng = np.random.default_rng(1)
    space = rng.normal(50, 5, 2000)
    own = np.sort(space)[[3, 100, 900]]
    exact = ranked_exposure(own, np.stack([np.delete(space, np.flatnonzero(space == loss)[0]) for loss in own]))
    drawn = np.mean([2.0 ** -ranked_exposure(own, rng.choice(space, (3, 200))) for _ in range(200)], axis=0)
    assert drawn == pytest.approx(2.0**-exact, rel=0.1, abs=1.5 / 200)
    assert ranked_exposure([0.0], rng.normal(50, 5, (1, 200)))[0] == math.log2(201), "a sample of 200 shows no more"


def test_a_secret_like_any_other_has_one_bit_in_the_median() -> None:
    rng = np.random.default_rng(2)
    losses = rng.gamma(30, 1, (800, 101))
    for exposure in (
        ranked_exposure(losses[:, 0], losses[:, 1:]),
        extrapolated_exposure(losses[:, 0], losses[:, 1:], 10**9),
    ):
        assert np.median(exposure) == pytest.approx(1, abs=0.15)
        assert exposure.mean() == pytest.approx(1 / math.log(2), abs=0.15), "-log2 of a uniform number"


def test_extrapolation_reaches_beyond_the_sample() -> None:
    rng = np.random.default_rng(3)
    candidates = rng.normal(50, 5, (1, 20_000))
    loss = 50 + 5 * scipy.stats.norm.ppf(2.0**-25)
    assert extrapolated_exposure([loss], candidates, 10**9)[0] == pytest.approx(25, abs=1.5)
    assert extrapolated_exposure([-1000.0], candidates, 10**9)[0] == pytest.approx(math.log2(10**9))
    assert extrapolated_exposure([5000.0], candidates, 10**9)[0] == 0
    same = extrapolated_exposure([3.0, 2.0, 4.0], np.full((3, 50), 3.0), 2**10)
    assert (same[0] <= 1, same[1], same[2]) == (True, 10.0, 0.0)


@pytest.mark.parametrize("shape", [-3.0, -1.0, 0.0, 2.0, 3.0])
def test_the_fit_finds_what_the_sample_was_drawn_from(shape: float) -> None:
    drawn = scipy.stats.skewnorm.rvs(shape, loc=30, scale=4, size=200_000, random_state=0)
    found = fit_skew_normal(drawn)
    for level in (0.01, 0.2, 0.7):
        at = scipy.stats.skewnorm.ppf(level, shape, 30, 4)
        assert math.exp(skew_normal_log_cdf(at, *found)) == pytest.approx(level, rel=0.1)


@pytest.mark.parametrize("shape", [-3.0, 0.0, 3.0])
def test_the_tail_is_the_integral_of_the_density(shape: float) -> None:
    for z in (-8.0, -5.0, -1.5, 0.5):
        grid = np.linspace(z - 12, z, 400_001)
        density = np.exp(scipy.stats.norm.logpdf(grid) + scipy.stats.norm.logcdf(shape * grid) + math.log(2))
        expected = math.log(np.trapezoid(density, grid))
        assert skew_normal_log_cdf(10 + 2 * z, shape, 10.0, 2.0) == pytest.approx(expected, abs=1e-3)
