"""Lower bounds from the guesses of one training run that use a whole privacy curve instead of one (epsilon, delta).

A trade-off function f says for each false-positive rate which false-negative rate an attacker on one document cannot
get below (Dong, Roth and Su 2019, arXiv 1905.02383). Here a curve is the inverse of 1 - f: the smallest probability of
an event without the document under which the event may have probability y with it.

Three bounds, for m canaries whose fair coins were guessed r times, v times right:

* :func:`fdp_epsilon_bound` and :func:`fdp_mu_bound`: Mahloujifar, Melis and Chaudhuri 2024 (arXiv 2410.22235),
  Theorem 3.2, with the curve of (epsilon, delta)-differential privacy and with that of a Gaussian mechanism.
* :func:`independent_mu_bound`: Xiang, Wang, Xiao, Tian and Wang 2025 (arXiv 2509.08704), their exact tail of the r
  guesses with the highest scores, under a Gaussian mechanism. It holds if the canaries do not influence each other's
  scores.

The Gaussian curve has one parameter, mu: training is mu-GDP if no attacker on one document does better than one who
tells N(0, 1) from N(mu, 1).
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import scipy.special
import scipy.stats
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Curve = Callable[[float], float]

PRECISION = 1e-7
"""Of epsilon and mu: far below any digit that is printed."""
LARGEST = 64.0
"""No larger epsilon or mu is looked for."""
NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)


def epsilon_delta_curve(y: float, epsilon: float, delta: float) -> float:
    """Return the curve of (epsilon, delta)-differential privacy at y (Dong, Roth and Su 2019, equation 3)."""
    return max(0.0, (y - delta) * math.exp(-epsilon), 1 - delta - math.exp(epsilon) * (1 - y))


def gaussian_curve(y: float, mu: float) -> float:
    """Return the curve of mu-GDP at y: Phi(Phi^-1(y) - mu)."""
    return float(ndtr(ndtri(y) - mu))


def refutes(canaries: int, guesses: int, correct: int, curve: Curve, level: float) -> bool:
    """Return whether P(so many right guesses or more) is at most ``level`` under every mechanism with this curve.

    Algorithm 3 of Mahloujifar et al. with two options per canary. With p_i the probability of i right guesses, let
    a_i be the sum over j >= i of j p_j / m, and b_i that of (r - j) p_j / m. Their Theorem 3.1 says that b_i is at
    least curve(a_(i+1)). Were P(v or more right) above the level, a_v would be at least level * v / m and b_v at most
    level * (r - v) / m; going down from there, a_0 + b_0 would exceed r / m, which it equals.

    Args:
        canaries: m.
        guesses: r, decided without looking at the coins.
        correct: v.
        curve: the inverse of 1 - f, increasing from 0 to 1.
        level: e.g. .05.

    Raises:
        ValueError: not 0 <= v <= r <= m, or the level is not in (0, 1).
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} right of {guesses} guesses about {canaries} canaries: must be 0 <= v <= r <= m")
    if not 0 < level < 1:
        raise ValueError(f"level {level} must be between 0 and 1")
    right, wrong = level * correct / canaries, level * (guesses - correct) / canaries
    for i in range(correct - 1, -1, -1):
        low = curve(right)
        if low < wrong:
            # Only at the first step, where ``wrong`` is still a largest and not a smallest value: from here on the
            # recursion never grows, so it refutes nothing.
            return False
        right += i / (guesses - i) * (low - wrong)
        wrong = low
        if right + wrong >= guesses / canaries:
            return True
    return False


def fdp_epsilon_bound(
    canaries: int, guesses: int, correct: int, *, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """Return the largest epsilon that so many right guesses refute, by Theorem 3.2 of Mahloujifar et al. 2024.

    It assumes as little as :func:`.epsilon.epsilon_lower_bound` and loses less to delta.

    Args:
        canaries: m.
        guesses: r, decided without looking at the coins.
        correct: v.
        delta: of the promise that is tested.
        confidence: e.g. .95: so often the true epsilon is not lower.

    Returns:
        0 if not even epsilon = 0 is refuted.

    Raises:
        ValueError: as :func:`refutes`, or delta is not in [0, 1].
    """
    if not 0 <= delta <= 1:
        raise ValueError(f"delta {delta} must be in [0, 1]")

    def refuted(epsilon: float) -> bool:
        curve = partial(epsilon_delta_curve, epsilon=epsilon, delta=delta)
        return refutes(canaries, guesses, correct, curve, 1 - confidence)

    return _largest(refuted)


def fdp_mu_bound(canaries: int, guesses: int, correct: int, *, confidence: float = 0.95) -> float:
    """Return the largest mu such that so many right guesses refute mu-GDP, by Theorem 3.2 of Mahloujifar et al. 2024.

    Args:
        canaries: m.
        guesses: r, decided without looking at the coins.
        correct: v.
        confidence: e.g. .95.

    Returns:
        0 if nothing is refuted.

    Raises:
        ValueError: as :func:`refutes`.
    """

    def refuted(mu: float) -> bool:
        return refutes(canaries, guesses, correct, partial(gaussian_curve, mu=mu), 1 - confidence)

    return _largest(refuted)


def _largest(refuted: Callable[[float], bool]) -> float:
    """Return the largest parameter that is refuted, by bisection; one that is refuted takes the smaller ones along."""
    low, high = 0.0, 1.0
    if not refuted(low):
        return 0.0
    while high < LARGEST and refuted(high):
        low, high = high, 2 * high
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def independent_p_value(canaries: int, guesses: int, correct: int, mu: float) -> float:
    """Return P(so many right guesses or more) of the best attacker on m independent Gaussian mechanisms.

    Each canary gives its own N(0, 1) or N(mu, 1), and the r with the clearest values are guessed. Given the clearest
    value that is not guessed, the guesses are independent, so that P = E[P(Binomial(r, e(W)) <= r - v)], where W has
    the distribution Beta(m - r, r + 1) and e(w) is the rate of errors among values clearer than a share w of them
    (Xiang et al. 2025). Whoever sees less than these values, or guesses otherwise, is right no more often.

    Args:
        canaries: m.
        guesses: r.
        correct: v.
        mu: at least 0.

    Raises:
        ValueError: not 0 <= v <= r <= m, or mu < 0.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} right of {guesses} guesses about {canaries} canaries: must be 0 <= v <= r <= m")
    if mu < 0:
        raise ValueError(f"mu {mu} must be at least 0")
    if not guesses:
        return 1.0
    if guesses == canaries:
        return float(scipy.stats.binom.cdf(guesses - correct, guesses, ndtr(-mu / 2)))
    clearer = scipy.stats.beta.isf((NODES + 1) / 2, canaries - guesses, guesses + 1)
    rates = _error_rate(1 - clearer, mu)
    return float(scipy.stats.binom.cdf(guesses - correct, guesses, rates) @ WEIGHTS / 2)


def _error_rate(share: Floats, mu: float) -> Floats:
    """Return the rate of errors among the clearest values [n]: this share of all, by distance from mu / 2."""
    low, high = np.zeros_like(share), np.full_like(share, mu / 2 + 40)
    for _ in range(60):
        distance = (low + high) / 2
        beyond = ndtr(mu / 2 - distance) + ndtr(-mu / 2 - distance) > share
        low, high = np.where(beyond, distance, low), np.where(beyond, high, distance)
    wrong, right = ndtr(-mu / 2 - low), ndtr(mu / 2 - low)
    rate: Floats = wrong / (wrong + right)
    return rate


def independent_mu_bound(canaries: int, guesses: int, correct: int, *, confidence: float = 0.95) -> float:
    """Return the largest mu that so many right guesses refute if no canary influences another's score.

    Args:
        canaries: m.
        guesses: r, decided without looking at the coins.
        correct: v.
        confidence: e.g. .95.

    Returns:
        0 if nothing is refuted.

    Raises:
        ValueError: as :func:`independent_p_value`, or the confidence is not in (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} must be between 0 and 1")

    def above_level(mu: float) -> float:
        return independent_p_value(canaries, guesses, correct, mu) - (1 - confidence)

    if above_level(0.0) > 0:
        return 0.0
    return float(brentq(above_level, 0.0, LARGEST, xtol=PRECISION))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return the delta of mu-GDP at an epsilon (Dong, Roth and Su 2019, Corollary 2.13)."""
    if mu == 0:
        return 0.0
    # e^epsilon can be huge and its factor tiny: their product is taken of logarithms.
    minus = math.exp(epsilon + float(scipy.special.log_ndtr(-epsilon / mu - mu / 2)))
    return max(0.0, float(ndtr(-epsilon / mu + mu / 2)) - minus)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon such that mu-GDP is (epsilon, delta)-differential privacy.

    Raises:
        ValueError: delta is not in (0, 1): at delta = 0 no Gaussian mechanism has an epsilon.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} must be between 0 and 1 for a Gaussian mechanism")
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    # At this epsilon the first term alone is delta, and the second one is taken off it.
    largest = mu * (mu / 2 - float(ndtri(delta)))
    return float(brentq(lambda epsilon: gaussian_delta(mu, epsilon) - delta, 0.0, largest, xtol=PRECISION))
