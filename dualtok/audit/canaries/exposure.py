"""How exposed a canary's secret is among those it might have been (Carlini et al. 2019, arXiv 1802.08232).

Legend: c canaries, n candidates of each, drawn from the space R of secrets without the true one.
A loss is the log-perplexity of the whole text: the sum of -log p over its tokens, in nats.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import scipy.special
import scipy.stats

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

MOST_SKEW = 0.995
"""Largest skewness of a sample that is fitted: a skew-normal distribution has less, whatever its shape."""
TAIL = 1e-6
"""Below this probability the distribution function loses digits, and the tail is integrated."""
NODES = np.linspace(0.0, 40.0, 2001)


def ranked_exposure(loss: ArrayLike, candidates: ArrayLike) -> Floats:
    """Return log2(n + 1) - log2(rank) [c], rank 1 being the lowest loss of a canary's own and its candidates'.

    With all other secrets as candidates, n + 1 = |R|, this is the definition: log2 |R| - log2 rank. With a sample it is
    the paper's estimate by sampling (section 4.3), at most log2(n + 1). An equal loss counts as lower, so that a model
    that says nothing gives no exposure.

    Args:
        loss: of the canaries [c].
        candidates: of their candidates [c, n].
    """
    own, others = np.asarray(loss, dtype=np.float64), np.asarray(candidates, dtype=np.float64)
    rank = 1 + np.count_nonzero(others <= own[:, None], axis=1)
    exposure: Floats = math.log2(others.shape[1] + 1) - np.log2(rank)
    return exposure


def extrapolated_exposure(loss: ArrayLike, candidates: ArrayLike, space: int) -> Floats:
    """Return -log2 P(a secret's loss <= the canary's) [c], P from a skew-normal fit of the candidates' losses.

    The paper's estimate by a distribution (section 4.3), fitted by moments: mean, variance and skewness. At most
    log2 |R|, where no other secret is likelier.

    Args:
        loss: of the canaries [c].
        candidates: of their candidates [c, n], n >= 3 for a fit worth its name.
        space: |R|.
    """
    own, others = np.asarray(loss, dtype=np.float64), np.asarray(candidates, dtype=np.float64)
    values = [-skew_normal_log_cdf(x, *fit_skew_normal(row)) / math.log(2) for x, row in zip(own, others, strict=True)]
    return np.clip(np.array(values, dtype=np.float64), 0.0, math.log2(space))


def fit_skew_normal(sample: ArrayLike) -> tuple[float, float, float]:
    """Return shape, location and scale of the skew-normal distribution with a sample's first three moments."""
    values = np.asarray(sample, dtype=np.float64)
    mean, deviation = float(values.mean()), float(values.std())
    if deviation <= 1e-12 * max(1.0, abs(mean)):
        return 0.0, mean, max(deviation, 1e-12)
    skew = float(np.clip(scipy.stats.skew(values), -MOST_SKEW, MOST_SKEW))
    root = abs(skew) ** (2 / 3)
    delta = math.copysign(math.sqrt(math.pi / 2 * root / (root + ((4 - math.pi) / 2) ** (2 / 3))), skew)
    delta = min(max(delta, -0.999), 0.999)
    scale = deviation / math.sqrt(1 - 2 * delta**2 / math.pi)
    return delta / math.sqrt(1 - delta**2), mean - scale * delta * math.sqrt(2 / math.pi), scale


def skew_normal_log_cdf(value: float, shape: float, location: float, scale: float) -> float:
    """Return log P(X <= value), accurate far into the lower tail too.

    Args:
        value: the x of the formula.
        shape: of the distribution; 0 is the normal one.
        location: of the distribution, in the unit of ``value``.
        scale: of the distribution, above 0, in the unit of ``value``.
    """
    z = (value - location) / scale
    probability = float(scipy.stats.skewnorm.cdf(z, shape))
    if probability > TAIL:
        return math.log(min(probability, 1.0))
    # The density is log-concave: below z it falls at least exponentially, at the rate of its logarithm at z.
    rate = -z + shape * math.exp(_log_normal(shape * z) - float(scipy.special.log_ndtr(shape * z)))
    steps = NODES / rate
    relative = np.exp(_log_density(z - steps, shape) - _log_density(np.array(z), shape))
    return float(_log_density(np.array(z), shape)) + math.log(float(np.trapezoid(relative, steps)))


def _log_normal(z: float) -> float:
    return -0.5 * z * z - 0.5 * math.log(2 * math.pi)


def _log_density(z: Floats, shape: float) -> Floats:
    density: Floats = math.log(2) - 0.5 * z**2 - 0.5 * math.log(2 * math.pi) + scipy.special.log_ndtr(shape * z)
    return density
