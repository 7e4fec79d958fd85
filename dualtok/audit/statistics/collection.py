"""Tests on collections of documents: many weak hints add up (dataset inference, Maini et al. 2024, arXiv 2406.06443).

The question is whether a collection that a data owner names was trained on. Its documents' scores are compared with
those of as many documents that certainly were not. A p-value comes from permuting the labels of exactly these
documents; a figure such as the AUC between groups that are drawn again and again from one finite pool would not be
.5 even for a model that saw no member (.64 to .70 in trials), since the groups share what sets the pools apart by
chance. How often such a test succeeds is measured on disjoint collections alone, for the same reason.

Legend: n members, m non-members, f scores per document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.stats

from dualtok.audit.attacks.adaptive import MOST_LEARNED, logistic
from dualtok.audit.attacks.crossfit import folds, one_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

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
    """Share of them with a p-value of at most .05; about .05 where nothing is given away."""
    rejected_low: float
    """Lower end of the exact 95 % interval of that share (Clopper and Pearson 1934)."""
    rejected_high: float
    """Upper end."""


def collection_tests(
    members: Floats, non_members: Floats, sizes: Sequence[int], seed: int, *, permutations: int = PERMUTATIONS
) -> list[CollectionTest]:
    """Test for each size whether collections of members have another mean score than collections of non-members.

    Args:
        members: one score per document [n]; the score must not have been fitted to these documents.
        non_members: likewise [m].
        sizes: documents per collection; those that there are too few documents for are left out.
        seed: of the collections and of the permutations.
        permutations: of the labels, behind each p-value; 1 / (permutations + 1) is about the smallest one-sided.

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
        pairs = [tuple(scores[i * size : (i + 1) * size] for scores in shuffled) for i in range(count)]
        p_values = [mean_difference_p_value(a, b, permutations, draw) for a, b in pairs]
        found = sum(p_value <= LEVEL for p_value in p_values)
        low, high = scipy.stats.binomtest(found, count).proportion_ci(method="exact")
        results.append(CollectionTest(size, p_values[0], count, found / count, float(low), float(high)))
    return results


def mean_difference_p_value(a: Floats, b: Floats, permutations: int, draw: np.random.Generator) -> float:
    """Return the two-sided p-value of a difference between two means, by giving the labels to the documents anew.

    Args:
        a: values of one group's documents.
        b: values of the other's.
        permutations: how often the labels are drawn; the smallest p-value is 1 / (permutations + 1).
        draw: source of the permutations.
    """

    if math.comb(len(a) + len(b), len(a)) <= permutations:  # all ways to give the labels are gone through
        return float(
            scipy.stats.permutation_test(
                (a, b), _mean_difference, n_resamples=permutations, vectorized=True, alternative="two-sided", rng=draw
            ).pvalue
        )
    # The draws and sums of scipy's test, which calls Python once per permutation, in one call.
    together = draw.permuted(np.tile(np.concatenate([a, b]), (permutations, 1)), axis=1)
    differences = _mean_difference(together[:, : len(a)], together[:, len(a) :], axis=-1)
    observed = float(a.mean() - b.mean())
    tolerance = abs(100 * np.finfo(np.float64).eps * observed)
    lower = np.count_nonzero(differences <= observed + tolerance)
    higher = np.count_nonzero(differences >= observed - tolerance)
    return min(1.0, 2 * (min(lower, higher) + 1) / (permutations + 1))


def _mean_difference(x: Floats, y: Floats, axis: int) -> Floats:
    return np.asarray(np.mean(x, axis=axis) - np.mean(y, axis=axis))


def learned_scores(members: Floats, non_members: Floats, seed: int) -> tuple[Floats, Floats]:
    """Return one score per document of the second halves: the combination of all scores that the first halves taught.

    As Maini et al.: a linear model of many scores is fitted on documents A, and applied to documents B alone. The
    halves are drawn at random and never change sides, so that scores of B are independent of each other given A.

    Args:
        members: scores of every attack, or other features [n, f], finite.
        non_members: likewise [m, f].
        seed: of the halves.

    Returns:
        Combined scores of the members and of the non-members in B, higher = member.

    Raises:
        ValueError: a class has fewer than two documents.
    """
    n, x = len(members), np.concatenate([members, non_members])
    known = folds(n, len(non_members), seed) == 0
    is_member = np.arange(len(x)) < n
    learned = np.flatnonzero(known)
    if len(learned) > MOST_LEARNED:
        learned = np.sort(np.random.default_rng(seed).choice(learned, MOST_LEARNED, replace=False))
    with one_thread():
        model = logistic().fit(x[learned], is_member[learned])
    return model.decision_function(x[~known & is_member]), model.decision_function(x[~known & ~is_member])


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that hold together (Holm 1979): each below .05 is significant though many were looked at."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    stepped = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values)[order] * factors))
    adjusted = np.empty(len(p_values))
    adjusted[order] = stepped
    return [float(p) for p in adjusted]
