"""AUC and true-positive rates over bootstrap resamples, for all attacks on a model at once.

Up to :data:`MOST_DRAWN` documents every resample is drawn, once for all attacks, with the draws of
:func:`.metrics.bootstrap` and to the same digit. Beyond, each figure is drawn from its law over resamples, so that the
cost does not grow with the documents:

* A resampled TPR depends on two ranks alone. Non-members drawn with replacement have uniform ranks, so that the rank of
  the one that the threshold lies at is an order statistic: m times a Beta variable, rounded down. The members above it
  are then binomial. This is the bootstrap's own law; nothing is rounded.
* A resampled AUC is taken from documents counted in :data:`BINS` bins of equal size, whose counts are multinomial.
  Within a bin the share of pairs that members win is held at the observed one, so that the resamples center on the
  exact AUC; what is left out is the variation inside a bin, about 1 / BINS of the whole.

Legend: n members, m non-members, f attacks, q false-positive rates, b resamples at a time, r resamples.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.signals.ragged import ROUNDING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Integers = NDArray[np.integer]
    Pair = tuple[Floats, Floats]

MOST_DRAWN = 20_000
"""Members and non-members together up to which every resample is drawn."""
BINS = 1024
"""Bins of equal size that the scores of more documents are counted in."""
CELLS = 1 << 17
"""Documents times resamples at a time: their counts, 512 KiB, stay in a core's cache."""


def resampled_figures(
    pairs: Sequence[Pair], fprs: Sequence[float], *, resamples: int, seed: int, most_drawn: int = MOST_DRAWN
) -> Floats:
    """Return the AUC and the largest TPR within each FPR of every attack over resamples [f, 1 + q, r].

    Members and non-members are drawn with replacement among themselves.

    Args:
        pairs: each attack's scores of members [n] and of non-members [m], the same documents in each, no NaN.
        fprs: the q false-positive rates.
        resamples: r.
        seed: the same seed draws the same documents, whatever the scores.
        most_drawn: documents up to which resamples are drawn; see the module.
    """
    n, m = len(pairs[0][0]), len(pairs[0][1])
    if n + m <= most_drawn:
        return _drawn(pairs, fprs, resamples, seed)
    generator = np.random.default_rng(seed)
    return np.stack([_from_laws(pair, fprs, resamples, generator) for pair in pairs])


def _drawn(pairs: Sequence[Pair], fprs: Sequence[float], resamples: int, seed: int) -> Floats:
    orders = [_Order(*pair) for pair in pairs]
    sizes = orders[0].sizes
    generators = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2)]
    values = np.empty((len(pairs), 1 + len(fprs), resamples))
    at_once = max(1, CELLS // max(sizes))
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        counts = [_counts(size, count, generator) for size, generator in zip(sizes, generators, strict=True)]
        for row, order in zip(values, orders, strict=True):
            row[:, start : start + count] = order.figures(counts[0], counts[1], fprs)
    return values


def _counts(documents: int, resamples: int, generator: np.random.Generator) -> NDArray[np.int32]:
    """Return how often each document is in each resample [documents, b]."""
    drawn = generator.integers(documents, size=(resamples, documents))
    cells = drawn * resamples + np.arange(resamples)[:, None]
    counts = np.bincount(cells.ravel(), minlength=documents * resamples)
    return counts.astype(np.int32).reshape(documents, resamples)


class _Order:
    """One attack's scores, sorted once: where each non-member stands among the members."""

    def __init__(self, members: Floats, non_members: Floats) -> None:
        self.sizes = len(members), len(non_members)
        self.members = np.argsort(-members, kind="stable")
        self.non_members = np.argsort(-non_members, kind="stable")
        ascending, levels = members[self.members[::-1]], non_members[self.non_members]
        self.above = len(members) - np.searchsorted(ascending, levels, side="right")
        """Members with a higher score than each non-member [m], those from the highest score down."""
        self.at_least = len(members) - np.searchsorted(ascending, levels, side="left")
        self.has_ties = bool((self.above != self.at_least).any())

    def figures(self, members: NDArray[np.int32], non_members: NDArray[np.int32], fprs: Sequence[float]) -> Floats:
        """Return AUC and TPRs [1 + q, b] of documents that count so often: [n, b] and [m, b]."""
        n, m = self.sizes
        resamples = members.shape[1]
        # Entry i: members among the i highest scores. Sums reach 2 n m.
        won_by = np.zeros((n + 1, resamples), dtype=np.int32 if 2 * n * m < 2**31 else np.int64)
        np.cumsum(members[self.members], axis=0, out=won_by[1:])
        others = non_members[self.non_members]
        wins = 2 * np.einsum("jb,jb->b", won_by[self.above], others)
        if self.has_ties:
            wins = wins // 2 + np.einsum("jb,jb->b", won_by[self.at_least], others)
        figures = np.empty((1 + len(fprs), resamples))
        figures[0] = 0.5 * wins / (n * m)
        for row, fpr in enumerate(fprs, 1):
            threshold = _first_beyond(others, math.floor(fpr * m + ROUNDING))
            found = np.append(self.above, n)[threshold]
            figures[row] = won_by[found, np.arange(resamples)] / n
        return figures


def _first_beyond(counts: NDArray[np.int32], allowed: int) -> NDArray[np.int64]:
    """Return the row at which each column's sum first exceeds ``allowed`` [b]; the number of rows where none does."""
    rows = min(len(counts), 2 * allowed + 32)
    while True:
        sums = np.cumsum(counts[:rows], axis=0, dtype=np.int32)
        if rows == len(counts) or (sums[-1] > allowed).all():
            beyond: NDArray[np.int64] = (sums <= allowed).sum(axis=0)
            return beyond
        rows = min(len(counts), 2 * rows)


def _from_laws(pair: Pair, fprs: Sequence[float], resamples: int, generator: np.random.Generator) -> Floats:
    members, non_members = (np.sort(scores) for scores in pair)
    n, m = len(members), len(non_members)
    figures = np.empty((1 + len(fprs), resamples))
    figures[0] = _binned_auc(members, non_members, resamples, generator)
    for row, fpr in enumerate(fprs, 1):
        allowed = math.floor(fpr * m + ROUNDING)
        if allowed >= m:
            figures[row] = 1.0
            continue
        rank = np.minimum(np.floor(m * generator.beta(allowed + 1, m - allowed, resamples)), m - 1).astype(np.int64)
        above = n - np.searchsorted(members, non_members[m - 1 - rank], side="right")
        figures[row] = generator.binomial(n, above / n) / n
    return figures


def _binned_auc(members: Floats, non_members: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """Return the AUC over resamples [r] of sorted scores that are counted in bins."""
    n, m = len(members), len(non_members)
    together = np.sort(np.concatenate([members, non_members]))
    edges = np.unique(together[np.linspace(0, n + m - 1, BINS + 1).astype(np.int64)[1:-1]])
    # A bin holds the scores in (edge before, edge], so that equal scores are never in two bins.
    counts = [
        np.diff(np.searchsorted(scores, edges, side="right"), prepend=0, append=len(scores))
        for scores in (members, non_members)
    ]
    below = np.searchsorted(non_members, members, side="left") + np.searchsorted(non_members, members, side="right")
    before = np.cumsum(counts[1]) - counts[1]
    starts = np.cumsum(counts[0]) - counts[0]
    wins = np.diff(np.concatenate([[0], np.cumsum(below / 2)])[np.append(starts, n)]) - counts[0] * before
    pairs = counts[0] * counts[1]
    won = np.divide(wins, pairs, out=np.full(len(pairs), 0.5), where=pairs > 0)
    values = np.empty(resamples)
    at_once = max(1, CELLS // len(pairs))
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        a, b = (
            generator.multinomial(len_of, count / len_of, size=rows)
            for len_of, count in zip((n, m), counts, strict=True)
        )
        lower = np.cumsum(b, axis=1) - b
        values[start : start + rows] = (a * (lower + won * b)).sum(axis=1) / (n * m)
    return values
