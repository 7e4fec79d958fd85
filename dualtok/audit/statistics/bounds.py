"""Lower bounds on epsilon by several methods, side by side, from the same guesses about canaries.

The bound of Steinke, Nasr and Jagielski 2023 is the one that was chosen in advance: it assumes nothing about how the
model was trained. Each other bound is corrected for the choice of scores and numbers of guesses as that one is, but not
for the number of methods: each holds with the stated confidence, and the largest of them does not.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from dualtok.audit.report.data import EpsilonBound
from dualtok.audit.statistics.epsilon import best_bound, epsilon_lower_bound
from dualtok.audit.statistics.f_dp import fdp_epsilon_bound, fdp_mu_bound, gaussian_epsilon, independent_mu_bound

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from dualtok.audit.report.data import BoundMethod
    from dualtok.audit.statistics.epsilon import LowerBound

CHOSEN: BoundMethod = "steinke"
OF_EPSILON: dict[BoundMethod, Callable[..., float]] = {"steinke": epsilon_lower_bound, "f_dp": fdp_epsilon_bound}
"""Methods that assume (epsilon, delta)-differential privacy and nothing else."""
OF_MU: dict[BoundMethod, Callable[..., float]] = {
    "f_dp_gaussian": fdp_mu_bound,
    "independent_gaussian": independent_mu_bound,
}
"""Methods that bound the mu of a Gaussian mechanism; at delta = 0 no such mechanism has an epsilon."""


def canary_bounds(
    scores: Mapping[str, NDArray[np.float64]],
    included: NDArray[np.bool_],
    guesses: Sequence[int],
    deltas: Sequence[float],
    confidence: float,
) -> list[EpsilonBound]:
    """Return the bounds of all methods at all deltas, those of the chosen method first.

    Args:
        scores: label -> of the canaries, [m]; higher says "included".
        included: how the coins fell, [m].
        guesses: numbers of guesses, fixed in advance.
        deltas: of the promise that is tested.
        confidence: of each bound.
    """
    of_epsilon = [
        _bound(method, partial(_at_delta, OF_EPSILON[method], delta), delta, scores, included, guesses, confidence)
        for method in OF_EPSILON
        for delta in deltas
    ]
    of_mu = [
        _bound(method, partial(_without_delta, OF_MU[method]), delta, scores, included, guesses, confidence)
        for method in OF_MU
        for delta in deltas
        if delta > 0
    ]
    return of_epsilon + of_mu


def _at_delta(bound: Callable[..., float], delta: float, m: int, r: int, v: int, confidence: float) -> float:
    return bound(m, r, v, delta=delta, confidence=confidence)


def _without_delta(bound: Callable[..., float], m: int, r: int, v: int, confidence: float) -> float:
    return bound(m, r, v, confidence=confidence)


def _bound(
    method: BoundMethod,
    lower_bound: LowerBound,
    delta: float,
    scores: Mapping[str, NDArray[np.float64]],
    included: NDArray[np.bool_],
    guesses: Sequence[int],
    confidence: float,
) -> EpsilonBound:
    which, best = best_bound(list(scores.values()), included, guesses, lower_bound, confidence=confidence)
    mu = best.value if method in OF_MU else None
    return EpsilonBound(
        method=method,
        delta=delta,
        epsilon=best.value if mu is None else gaussian_epsilon(mu, delta),
        mu=mu,
        label=list(scores)[which],
        guesses=best.guesses,
        correct=best.correct,
        tests=len(scores) * len(guesses),
    )
