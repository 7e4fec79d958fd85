"""Lower bounds on epsilon by several methods, side by side, from the same guesses about canaries.

The bound of Steinke, Nasr and Jagielski 2023 is the one that was chosen in advance: it assumes nothing about how the
model was trained. Each other bound is corrected for the choice of scores and numbers of guesses as that one is, but not
for the number of methods: each holds with the stated confidence, and the largest of them does not.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from dualtok.audit.canaries.epsilon import best_bound, epsilon_lower_bound
from dualtok.audit.canaries.f_dp import fdp_epsilon_bound, fdp_mu_bound, gaussian_epsilon, independent_mu_bound
from dualtok.audit.report.data import EpsilonBound

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from dualtok.audit.canaries.epsilon import Bound, LowerBound
    from dualtok.audit.report.data import BoundMethod

CHOSEN: BoundMethod = "steinke"
OF_EPSILON: dict[BoundMethod, Callable[..., float]] = {"steinke": epsilon_lower_bound, "f_dp": fdp_epsilon_bound}
"""Methods that assume (epsilon, delta)-differential privacy and nothing else."""
OF_MU: dict[BoundMethod, LowerBound] = {"f_dp_gaussian": fdp_mu_bound, "independent_gaussian": independent_mu_bound}
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

    def best(lower_bound: LowerBound) -> tuple[str, Bound]:
        which, bound = best_bound(list(scores.values()), included, guesses, lower_bound, confidence=confidence)
        return list(scores)[which], bound

    tests = len(scores) * len(guesses)
    found: list[EpsilonBound] = []
    for method, of_epsilon in OF_EPSILON.items():
        for delta in deltas:
            label, bound = best(partial(of_epsilon, delta=delta))
            found.append(
                EpsilonBound(
                    method=method,
                    delta=delta,
                    epsilon=bound.value,
                    label=label,
                    guesses=bound.guesses,
                    correct=bound.correct,
                    tests=tests,
                )
            )
    for method, of_mu in OF_MU.items():
        label, bound = best(of_mu)
        found += [
            EpsilonBound(
                method=method,
                delta=delta,
                epsilon=gaussian_epsilon(bound.value, delta),
                mu=bound.value,
                label=label,
                guesses=bound.guesses,
                correct=bound.correct,
                tests=tests,
            )
            for delta in deltas
            if delta > 0
        ]
    return found
