"""The smallest leak that an audit of so many documents would have seen, by simulation.

Members' scores are made of the non-members' by a shift, so that all that is simulated has the spread of the scores
themselves. An audit sees a leak if the lower end of the interval that is corrected for all attacks lies above .5.

Legend: u scores of the pool that is drawn from, r simulations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.report.details import Power
from dualtok.audit.statistics.metrics import corrected_deviations

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Pair = tuple[Floats, Floats]

PROBABILITY = 0.8
SIMULATIONS = 400
MOST_SCORES = 256
"""Scores of the pool; of more non-members so many quantiles are taken."""
PRECISION = 0.001
"""Of the AUC that is looked for."""


def audit_power(scores: Mapping[str, Pair], widening: Mapping[str, float], *, confidence: float, seed: int) -> Power:
    """Return the smallest AUC of an attack at which :data:`PROBABILITY` of simulated audits see it.

    It is that of the attack whose intervals are widest for their number of documents (a cross-fitted one, if one was
    run), the strongest of those: a figure that holds for whichever attack finds the leak.

    Args:
        scores: attack -> scores of members [n] and of non-members [m].
        widening: attack -> factor of its deviations.
        confidence: of the intervals, before the correction for the number of attacks.
        seed: of the simulations.
    """
    widest = max(widening[name] for name in scores)
    chosen = next(name for name in scores if widening[name] == widest)
    members, non_members = scores[chosen]
    auc = smallest_auc(
        non_members,
        len(members),
        len(non_members),
        deviations=widest * corrected_deviations(confidence, len(scores), min(len(members), len(non_members))),
        seed=seed,
    )
    return Power(auc=auc, probability=PROBABILITY, simulations=SIMULATIONS)


def smallest_auc(pool: Floats, n: int, m: int, *, deviations: float, seed: int) -> float:
    """Return the smallest AUC, to about :data:`PRECISION`, at which 80 % of simulated audits see a leak.

    n members and m non-members are drawn from the pool, the members' scores are shifted, and the leak is seen if the
    AUC exceeds .5 by so many of its own deviations (those of the bootstrap, in closed form: DeLong et al. 1988).

    Args:
        pool: scores that spread like those of non-members.
        n: members of an audit.
        m: non-members.
        deviations: how many the lower end of the interval lies below the AUC.
        seed: of the draws, which are the same for every shift.
    """
    pool = np.sort(pool[np.isfinite(pool)])
    if len(pool) == 0 or pool[0] == pool[-1]:
        pool = np.arange(float(m))  # scores that are all alike say nothing of the spread
    if len(pool) > MOST_SCORES:
        pool = np.quantile(pool, (np.arange(MOST_SCORES) + 0.5) / MOST_SCORES)
    generator = np.random.default_rng(seed)
    even = np.full(len(pool), 1 / len(pool))
    members, non_members = (generator.multinomial(size, even, size=SIMULATIONS).T / size for size in (n, m))
    # A shift by the share a of the differences between two of the pool gives an AUC of a.
    differences = np.sort((pool[:, None] - pool).ravel())
    low, high, best = 0.5, 1.0, 1.0
    while high - low > PRECISION:
        middle = (low + high) / 2
        shift = float(differences[int(middle * (len(differences) - 1))])
        seen = _seen(pool, shift, members, non_members, deviations=deviations, sizes=(n, m))
        if np.mean(seen) >= PROBABILITY:
            high, best = middle, _auc(pool, shift)
        else:
            low = middle
    return best


def _auc(pool: Floats, shift: float) -> float:
    """Return P(X + shift > Y) + P(equal) / 2 of two draws from the sorted pool."""
    below = np.searchsorted(pool, pool + shift, side="left") + np.searchsorted(pool, pool + shift, side="right")
    return float(below.mean()) / (2 * len(pool))


def _seen(
    pool: Floats, shift: float, members_ur: Floats, non_members_ur: Floats, *, deviations: float, sizes: tuple[int, int]
) -> NDArray[np.bool_]:
    """Return which simulated audits see a shift [r]; each column of weights sums to 1."""
    zero = np.zeros((1, members_ur.shape[1]))
    # Placements: of each member among the non-members, and of each non-member among the members.
    below = np.concatenate([zero, np.cumsum(non_members_ur, axis=0)])
    won = _between(below, pool, pool + shift)
    lost = _between(np.concatenate([zero, np.cumsum(members_ur, axis=0)]), pool + shift, pool)
    auc = np.einsum("ur,ur->r", members_ur, won)
    variance = (np.einsum("ur,ur->r", members_ur, won**2) - auc**2) / sizes[0]
    variance += (np.einsum("ur,ur->r", non_members_ur, lost**2) - (1 - auc) ** 2) / sizes[1]
    seen: NDArray[np.bool_] = auc - deviations * np.sqrt(np.maximum(variance, 0)) > 0.5
    return seen


def _between(sums: Floats, levels: Floats, scores: Floats) -> Floats:
    """Return the weight of the levels below each score, those equal to it by half."""
    left, right = (np.searchsorted(levels, scores, side=side) for side in ("left", "right"))
    return sums[left] if np.array_equal(left, right) else (sums[left] + sums[right]) / 2
