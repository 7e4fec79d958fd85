"""Set the lower bounds on epsilon of all methods side by side, on simulated guesses about canaries.

    python tools/compare_epsilon_bounds.py            # seconds; prints two tables in Markdown

Each run tosses a fair coin per canary and lets a mechanism of known privacy give one number per canary; those with the
highest and the lowest numbers are guessed. The table has the mean of each method's bound at delta = 1e-5 over the
runs, and the share of the runs in which it exceeds the truth, which must stay near .05 or below.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dualtok.audit.canaries.epsilon import epsilon_lower_bound, guess
from dualtok.audit.canaries.f_dp import fdp_epsilon_bound, fdp_mu_bound, gaussian_epsilon, independent_mu_bound

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Mechanism = Callable[[np.random.Generator, NDArray[np.bool_]], NDArray[np.float64]]

DELTA = 1e-5
METHODS: dict[str, Callable[[int, int, int], float]] = {
    "Steinke 2023": lambda m, r, v: epsilon_lower_bound(m, r, v, delta=DELTA),
    "f-DP": lambda m, r, v: fdp_epsilon_bound(m, r, v, delta=DELTA),
    "f-DP, Gaussian": lambda m, r, v: gaussian_epsilon(fdp_mu_bound(m, r, v), DELTA),
    "independent, Gaussian": lambda m, r, v: gaussian_epsilon(independent_mu_bound(m, r, v), DELTA),
}


def gaussian(mu: float) -> Mechanism:
    """Return a mechanism of mu-GDP: each canary gives N(0, 1) or N(mu, 1) of its own."""
    return lambda rng, coins: coins * mu + rng.normal(size=coins.shape)


def shared_noise(mu: float) -> Mechanism:
    """Return a mechanism of mu-GDP whose canaries depend on each other: all have one likelihood ratio."""

    def release(rng: np.random.Generator, coins: NDArray[np.bool_]) -> NDArray[np.float64]:
        right = 1 / (1 + math.exp(-mu * abs(rng.normal(mu / 2, 1))))
        return np.where(coins == (rng.random(coins.shape) < right), 1.0, -1.0) + rng.uniform(0, 0.1, coins.shape)

    return release


def randomised_response(epsilon: float) -> Mechanism:
    """Return a mechanism of (epsilon, 0)-differential privacy: each coin, flipped with probability 1 / (1 + e^eps)."""

    def release(rng: np.random.Generator, coins: NDArray[np.bool_]) -> NDArray[np.float64]:
        right = rng.random(coins.shape) < 1 / (1 + math.exp(-epsilon))
        return np.where(coins == right, 1.0, -1.0) + rng.uniform(0, 0.1, coins.shape)

    return release


CASES: list[tuple[str, Mechanism, float, int, int]] = [
    ("Gaussian, mu .5", gaussian(0.5), gaussian_epsilon(0.5, DELTA), 1000, 100),
    ("Gaussian, mu 1", gaussian(1.0), gaussian_epsilon(1.0, DELTA), 200, 50),
    ("Gaussian, mu 1", gaussian(1.0), gaussian_epsilon(1.0, DELTA), 1000, 100),
    ("Gaussian, mu 1", gaussian(1.0), gaussian_epsilon(1.0, DELTA), 1000, 1000),
    ("Gaussian, mu 1", gaussian(1.0), gaussian_epsilon(1.0, DELTA), 10_000, 1000),
    ("Gaussian, mu 2", gaussian(2.0), gaussian_epsilon(2.0, DELTA), 1000, 100),
    ("Gaussian, mu 1, one noise for all", shared_noise(1.0), gaussian_epsilon(1.0, DELTA), 1000, 1000),
    ("randomised response", randomised_response(2.0), 2.0, 1000, 1000),
]
"""Name, mechanism, its epsilon at delta = 1e-5, canaries, guesses."""


def bounds_of_runs(
    mechanism: Mechanism, canaries: int, guesses: int, runs: int, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Return each method's bounds [runs]."""
    rng = np.random.default_rng(seed)
    right = []
    for _ in range(runs):
        coins = rng.random(canaries) < 0.5
        guessed = guess(mechanism(rng, coins), guesses)
        right.append(int(np.count_nonzero(guessed == np.where(coins, 1, -1))))
    found = {}
    for name, method in METHODS.items():
        once = lru_cache(maxsize=None)(method)
        found[name] = np.array([once(canaries, guesses, correct) for correct in right])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400, help="simulated trainings per row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{options.runs} runs a row, seed {options.seed}: mean bound on epsilon (share of runs above the truth)\n")
    print("| mechanism | canaries | guesses | true epsilon | " + " | ".join(METHODS) + " |")
    print("|---" * (4 + len(METHODS)) + "|")
    for name, mechanism, truth, canaries, guesses in CASES:
        found = bounds_of_runs(mechanism, canaries, guesses, options.runs, options.seed)
        cells = [f"{values.mean():.2f} ({(values > truth + 1e-6).mean():.3f})" for values in found.values()]
        print(f"| {name} | {canaries:,} | {guesses:,} | {truth:.2f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
