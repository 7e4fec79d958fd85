"""Scores from classifiers that learn which documents are members: every document is judged by one that never saw it.

The documents are cut at random into two halves, each with half the members and half the non-members, and a classifier
of either half judges the other. Two classifiers' outputs are not on one scale, so that a half's scores are replaced by
their ranks within it.

The two halves' errors are not independent. If by chance the same direction sets members apart in both halves, either
classifier profits from the other half's accident; if opposite ones do, both lose. Where there is nothing to find, the
AUC of such scores spreads up to sqrt(2) times as widely as that of as many fixed scores: as if it came from one half
alone. An interval that knows nothing of this held .5 in 85 % of simulated audits instead of 95 %. So the deviations of
cross-fitted figures are counted :data:`WIDENING` times wherever an interval or a p-value is made of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# Imported where they are used, for what they take to load: scikit-learn (1 s), scipy (half a second).

FOLDS = 2
FEWEST = 20
"""Members, and non-members, below which no classifier is trained: its figure would say nothing."""
PART = 1 << 16
"""Documents that are judged at a time."""
WIDENING = float(np.sqrt(FOLDS))
"""How much wider than fixed scores' the deviation of a cross-fitted figure is at most: the deviation of a mean over
folds is at most the mean of the folds' deviations, and each of those is sqrt(FOLDS) times that of all documents."""


def folds(n_members: int, n_non_members: int, seed: int) -> NDArray[np.int64]:
    """Return the fold, 0 or 1, of each member and then each non-member [n + m]; both classes are cut in half.

    Args:
        n_members: number n of members.
        n_non_members: number m of non-members.
        seed: of the cut.

    Raises:
        ValueError: a class has fewer documents than there are folds.
    """
    from sklearn.model_selection import StratifiedKFold

    if min(n_members, n_non_members) < FOLDS:
        raise ValueError(f"{n_members} members and {n_non_members} non-members; cutting needs {FOLDS} of each")
    is_member = np.arange(n_members + n_non_members) < n_members
    fold = np.empty(len(is_member), dtype=np.int64)
    halves = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(is_member, is_member)
    for number, (_, judged) in enumerate(halves):
        fold[judged] = number
    return fold


def one_thread() -> Any:
    """Return a context in which linear algebra uses one thread.

    Matrices of some dozen columns are too small to share: a regression of 836 documents takes four times the processor
    time with two threads, and no less time.
    """
    from threadpoolctl import threadpool_limits  # only where scikit-learn, which needs it, is loaded too

    return threadpool_limits(limits=1, user_api="blas")


def cross_fitted_scores(
    model: Any, x: Any, n_members: int, seed: int, *, most_learned: int | None = None
) -> tuple[Floats, Floats]:
    """Return how member-like each document is to a classifier that was not trained on it.

    Args:
        model: scikit-learn classifier with ``predict_proba``; it is cloned.
        x: features [n + m, f], members first; an array or a sparse matrix.
        n_members: n.
        seed: of the halves.
        most_learned: documents that a classifier learns from at most, drawn at random from its half; None: all.

    Returns:
        Ranks within the halves, in (0, 1), higher = member: of members [n] and of non-members [m].

    Raises:
        ValueError: a class has fewer documents than there are folds.
    """
    from scipy.stats import rankdata  # half a second, which reading a run's settings would pay
    from sklearn.base import clone

    fold = folds(n_members, x.shape[0] - n_members, seed)
    is_member = np.arange(len(fold)) < n_members
    scores = np.empty(len(fold))
    for number in range(FOLDS):
        judged, known = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        if most_learned is not None and len(known) > most_learned:
            draw = np.random.default_rng([seed, number])
            known = np.sort(draw.choice(known, most_learned, replace=False))
        with one_thread():
            fitted = clone(model).fit(x[known], is_member[known])
            parts = [
                fitted.predict_proba(x[judged[first : first + PART]])[:, 1] for first in range(0, len(judged), PART)
            ]
        scores[judged] = rankdata(np.concatenate(parts)) / (len(judged) + 1)
    return scores[:n_members], scores[n_members:]
