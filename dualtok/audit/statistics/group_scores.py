"""Scores of groups of documents, on a scale on which groups of any size can be compared.

The documents of one person are alike: in style, in topic, and so in their loss, whether a model saw them or not. Of k
documents whose scores correlate by rho within groups, the mean has the variance of k / (1 + (k - 1) rho) independent
documents (the design effect, Kish 1965). rho is estimated here and counted wherever a group is judged; a test that
treats a person's documents as independent takes a style for membership.

Legend: a attacks, d documents of both sides, g groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.optimize
import scipy.stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Side:
    """How the members, or the non-members, are cut into groups."""

    names: list[str]
    """Of the groups [g], sorted."""
    sizes: NDArray[np.int64]
    """Documents in each [g]."""
    rows: NDArray[np.int64]
    """Positions of the documents in groups, group after group [sum of the sizes]."""
    documents: int
    """All documents of the side."""
    without_group: int
    """Documents that have no group."""
    small_groups: int
    """Groups that were left out for having too few documents."""

    def sums(self, scores_ad: Floats) -> Floats:
        """Return the sum of each group's scores [a, g]; the columns of ``scores_ad`` are those of ``rows``."""
        starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        return np.asarray(np.add.reduceat(scores_ad, starts, axis=1))


def side_of(groups: Sequence[str | None], min_documents: int) -> Side:
    """Return the groups of at least so many documents; ``groups`` has one name per document, None for no group."""
    named = np.array([row for row, group in enumerate(groups) if group is not None], dtype=np.int64)
    found = [group for group in groups if group is not None]
    names, codes, counts = np.unique(np.array(found, dtype=object), return_inverse=True, return_counts=True)
    kept = counts >= min_documents
    order = np.argsort(codes, kind="stable")
    return Side(
        names=[str(name) for name in names[kept]],
        sizes=counts[kept].astype(np.int64),
        rows=named[order][kept[codes[order]]] if len(named) else named,
        documents=len(groups),
        without_group=len(groups) - len(named),
        small_groups=int(np.count_nonzero(~kept)),
    )


def normal_scores(members_ad: Floats, non_members_ad: Floats) -> Floats:
    """Return van der Waerden's scores of all documents, attack by attack [a, d], members first.

    Ranks among the documents of both sides, as quantiles of the normal distribution: infinite scores and heavy tails do
    no harm, and exchangeable documents stay exchangeable, as the null by random groups needs.
    """
    together = np.concatenate([members_ad, non_members_ad], axis=1)
    ranks = scipy.stats.rankdata(together, axis=1)
    return np.asarray(scipy.stats.norm.ppf(ranks / (together.shape[1] + 1)))


def likeness(sides: Sequence[tuple[Floats, Side]]) -> Floats:
    """Return each attack's intraclass correlation [a], 0 to 1: how alike the scores of a group's documents are.

    The estimate is that of a one-way analysis of variance with groups of unequal sizes, plus its standard error (Donner
    1986, International Statistical Review 54:67): an estimate that is too low by chance would make persons with a style
    of their own stand out.

    Args:
        sides: scores of the documents in groups [a, sum of the sizes], and their groups; sides are pooled, so that what
            sets members apart from non-members is no likeness.
    """
    between: Floats | float = 0.0
    within: Floats | float = 0.0
    groups = documents = 0
    weight = 0.0
    for scores, side in sides:
        means = side.sums(scores) / side.sizes
        between = between + (side.sizes * (means - scores.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
        within = within + ((scores - np.repeat(means, side.sizes, axis=1)) ** 2).sum(axis=1)
        groups += len(side.sizes) - 1
        documents += len(side.rows) - len(side.sizes)
        weight += len(side.rows) - float((side.sizes**2).sum()) / len(side.rows)
    size = weight / groups
    mean_between, mean_within = np.asarray(between) / groups, np.asarray(within) / documents
    total = mean_between + (size - 1) * mean_within
    rho = np.divide(mean_between - mean_within, total, out=np.zeros_like(total), where=total > 0)
    rho = np.clip(rho, 0.0, 1.0)
    error = (1 - rho) * (1 + (size - 1) * rho) * np.sqrt(2 / (size * (size - 1) * groups))
    return np.asarray(np.minimum(1.0, rho + error))


def design_effect(sizes: NDArray[np.int64], rho: Floats) -> Floats:
    """Return by what factor the likeness of their documents widens the variance of groups' means [a, g]."""
    return np.asarray(1 + (sizes - 1) * rho[:, None])


def auc_interval(auc: float, n: float, m: float, confidence: float) -> tuple[float, float]:
    """Return the interval of an AUC of n scores against m by method 5 of Newcombe 2006 (Statistics in Medicine 25:559).

    It has a width where the classes are separated completely and holds for a handful of scores, unlike the bootstrap.
    An end t solves |auc - t| = z sqrt(V(t)), V(t) = t (1 - t) / (n m) (1 + (s - 1) ((1 - t) / (2 - t) + t / (1 + t))),
    s = (n + m) / 2.

    Args:
        auc: 0 to 1.
        n: scores of one class, or as many as they are worth; at least 1.
        m: likewise of the other.
        confidence: e.g. 0.95.
    """
    z = float(scipy.stats.norm.isf((1 - confidence) / 2))
    return _low_end(auc, n, m, z), 1.0 - _low_end(1.0 - auc, n, m, z)


def _low_end(auc: float, n: float, m: float, z: float) -> float:
    def spread(t: float) -> float:
        half = (n + m) / 2
        return z**2 * t / (n * m) * (1 + (half - 1) * ((1 - t) / (2 - t) + t / (1 + t)))

    if auc == 0.0:
        return 0.0
    if auc == 1.0:  # both sides of the equation have the factor 1 - t, which would hide the end
        return float(scipy.optimize.brentq(lambda t: 1 - t - spread(t), 0.0, 1.0))
    return float(scipy.optimize.brentq(lambda t: (auc - t) ** 2 - (1 - t) * spread(t), 0.0, auc))
