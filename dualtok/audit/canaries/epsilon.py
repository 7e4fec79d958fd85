"""A lower bound on epsilon from one training run (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846).

Each of m canaries was included by a fair coin of its own. An auditor sees the model and guesses r of the coins,
abstaining on the others; v guesses are right. Were training (epsilon, delta)-differentially private, each right guess
would be hardly likelier than e^epsilon / (1 + e^epsilon), whatever the auditor does; more right guesses than that
refute the epsilon.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import scipy.stats
from scipy.optimize import brentq

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

PRECISION = 1e-14
"""Of epsilon: far below any digit that is printed."""


class LowerBound(Protocol):
    """The largest parameter that some guesses refute, e.g. :func:`epsilon_lower_bound` at one delta."""

    def __call__(self, canaries: int, guesses: int, correct: int, *, confidence: float) -> float:
        """Return it; 0 where nothing is refuted."""
        ...


class Bound(NamedTuple):
    """A lower bound and the guesses behind it."""

    value: float
    """Of epsilon, or of another parameter that grows as privacy shrinks; 0 where nothing is refuted."""
    guesses: int
    correct: int


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float = 0.0) -> float:
    """Return an upper bound on P(so many right guesses or more) under (epsilon, delta)-differential privacy.

    With delta = 0 it is P(Binomial(r, q) >= v), q = e^epsilon / (1 + e^epsilon); delta adds
    2 m delta max_i P(v > Binomial(r, q) >= v - i) / i (their Theorem 5.2).

    Args:
        canaries: m, all whose coins were tossed.
        guesses: r, those that were guessed.
        correct: v.
        epsilon: of the hypothesis.
        delta: of the hypothesis.

    Raises:
        ValueError: not 0 <= v <= r <= m, epsilon < 0, or delta not in [0, 1].
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} right of {guesses} guesses about {canaries} canaries: must be 0 <= v <= r <= m")
    if epsilon < 0 or not 0 <= delta <= 1:
        raise ValueError(f"epsilon {epsilon} must be at least 0, and delta {delta} in [0, 1]")
    rate = 1 / (1 + math.exp(-epsilon))
    tail = float(scipy.stats.binom.sf(correct - 1, guesses, rate))
    if delta and correct:
        below = np.cumsum(scipy.stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, rate))
        tail += 2 * canaries * delta * float((below / np.arange(1, correct + 1)).max())
    return min(tail, 1.0)


def epsilon_lower_bound(
    canaries: int, guesses: int, correct: int, *, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """Return the largest epsilon that so many right guesses refute: with ``confidence`` the true one is not lower.

    An (epsilon, delta) that is refuted takes every smaller epsilon with it, since that would be a stronger promise.

    Args:
        canaries: m.
        guesses: r, decided without looking at the coins.
        correct: v.
        delta: of the promise that is tested.
        confidence: e.g. .95.

    Returns:
        0 if not even epsilon = 0 is refuted.

    Raises:
        ValueError: as :func:`p_value`, or the confidence is not in (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} must be between 0 and 1")
    level = 1 - confidence

    def above_level(epsilon: float) -> float:
        return p_value(canaries, guesses, correct, epsilon, delta) - level

    if above_level(0.0) > 0:
        return 0.0
    # The p-value is at least P(all r guesses are right) = q^r, and that is the level where epsilon = certain.
    certain = -math.log(math.expm1(-math.log(level) / guesses))
    return float(brentq(above_level, 0.0, certain + 1, xtol=PRECISION, maxiter=1000))


def guess(scores: ArrayLike, guesses: int) -> NDArray[np.int64]:
    """Return a guess per canary: 1 (included) for the highest scores, -1 for the lowest, 0 where the auditor abstains.

    Args:
        scores: [m], higher says "included"; equal ones in their order, which knows nothing of the coins.
        guesses: how many; half of them at either end, an odd one at the top.

    Raises:
        ValueError: more guesses than canaries, or a score is NaN.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not 0 <= guesses <= len(values) or np.isnan(values).any():
        raise ValueError(
            f"{guesses} guesses from {len(values)} scores, {np.count_nonzero(np.isnan(values))} of them NaN"
        )
    order = np.argsort(values, kind="stable")
    result = np.zeros(len(values), dtype=np.int64)
    result[order[: guesses // 2]] = -1
    result[order[len(order) - (guesses - guesses // 2) :]] = 1
    return result


def best_bound(
    scores: Sequence[ArrayLike],
    included: ArrayLike,
    guesses: Sequence[int],
    lower_bound: LowerBound,
    *,
    confidence: float = 0.95,
) -> tuple[int, Bound]:
    """Return the best bound over several scores and numbers of guesses, corrected for choosing it (Bonferroni).

    Args:
        scores: of the canaries, [m] each; higher says "included".
        included: how the coins fell, [m].
        guesses: numbers of guesses, fixed in advance.
        lower_bound: of what, and by which method.
        confidence: of the result: each of the tests is held to its share of what is left.

    Returns:
        (which score, its bound); the first where all are 0.

    Raises:
        ValueError: no scores or no guesses, or as :func:`guess`.
    """
    if not scores or not guesses:
        raise ValueError("a bound needs at least one score and one number of guesses")
    coins = np.where(np.asarray(included, dtype=bool), 1, -1)
    each = 1 - (1 - confidence) / (len(scores) * len(guesses))
    found = []
    for which, values in enumerate(scores):
        for number in guesses:
            correct = int(np.count_nonzero(guess(values, number) == coins))
            found.append((which, Bound(lower_bound(len(coins), number, correct, confidence=each), number, correct)))
    return max(found, key=lambda item: item[1].value)
