"""Tests on collections of documents: many weak hints add up (dataset inference, Maini et al. 2024, arXiv 2406.06443).

The question is whether a collection that a data owner names was trained on. Its documents' scores are compared with
those of as many documents that certainly were not. A p-value comes from permuting the labels of exactly these
documents; a figure such as the AUC between groups that are drawn again and again from one finite pool would not be
.5 even for a model that saw no member (.64 to .70 in trials), since the groups share what sets the pools apart by
chance.

Legend: n members, m non-members, f scores per document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.stats

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVEL = 0.05
PERMUTATIONS = 999
MOST_COLLECTIONS = 100
"""Disjoint collections of one size that are tested at most."""


@dataclass(frozen=True)
class CollectionTest:
    """The outcome for one size of collection and one score."""

    size: int
    """Members, and non-members, in a collection."""
    p_value: float
    """Of the collection that the seed drew first, two-sided."""
    collections: int
    """Disjoint collections that were tested: as many as the documents suffice for, up to 100."""
    rejected: float
    """Share of them with a p-value below .05; about .05 where nothing is given away."""


def collection_tests(
    members: NDArray[np.float64], non_members: NDArray[np.float64], sizes: Sequence[int], seed: int
) -> list[CollectionTest]:
    """Test for each size whether collections of members have another mean score than collections of non-members.

    Args:
        members: one score per document [n].
        non_members: likewise [m].
        sizes: documents per collection; those that there are too few documents for are left out.
        seed: of the collections and of the permutations.

    Returns:
        One result per remaining size, in their order.
    """
    draw = np.random.default_rng(seed)
    shuffled = draw.permutation(members), draw.permutation(non_members)
    results = []
    for size in sizes:
        count = min(min(len(members), len(non_members)) // size, MOST_COLLECTIONS)
        if count == 0:
            continue
        p_values = [
            _p_value(*(scores[i * size : (i + 1) * size] for scores in shuffled), draw=draw) for i in range(count)
        ]
        results.append(CollectionTest(size, p_values[0], count, float(np.mean(np.array(p_values) < LEVEL))))
    return results


def _p_value(a: NDArray[np.float64], b: NDArray[np.float64], *, draw: np.random.Generator) -> float:
    """Return the two-sided permutation p-value of a difference in means."""

    def difference(x: NDArray[np.float64], y: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.asarray(np.mean(x, axis=axis) - np.mean(y, axis=axis))

    result = scipy.stats.permutation_test(
        (a, b), difference, n_resamples=PERMUTATIONS, vectorized=True, alternative="two-sided", rng=draw
    )
    return float(result.pvalue)


def learned_scores(
    members: NDArray[np.float64], non_members: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return one score per document of the second halves, the combination of all scores that the first halves taught.

    As Maini et al.: a linear model of many attacks' scores is fitted on documents A, and applied to documents B alone.

    Args:
        members: scores of every attack [n, f], finite.
        non_members: likewise [m, f].
        seed: of the halves.

    Returns:
        Combined scores of the members and non-members in B.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    draw = np.random.default_rng(seed)
    halves = [np.array_split(draw.permutation(rows), 2) for rows in (members, non_members)]
    (known_in, test_in), (known_out, test_out) = halves
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    model.fit(np.concatenate([known_in, known_out]), np.arange(len(known_in) + len(known_out)) < len(known_in))
    return model.decision_function(test_in), model.decision_function(test_out)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that hold together (Holm 1979): each below .05 is significant though many were looked at."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    stepped = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values)[order] * factors))
    adjusted = np.empty(len(p_values))
    adjusted[order] = stepped
    return [float(p) for p in adjusted]
