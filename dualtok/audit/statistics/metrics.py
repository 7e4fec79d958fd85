"""How well scores tell members from non-members; the conventions are those of the audit's documentation.

Legend: r resamples, u score levels (distinct scores, ascending).
A higher score says "member"; scores may be infinite, not NaN.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
import sklearn.metrics
from numpy.typing import ArrayLike, NDArray

from dualtok.audit.signals.ragged import ROUNDING

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
RankStatistic = Callable[[Counts, Counts], Floats]
"""(member counts [r, u], non-member counts [r, u]) -> values [r]: any figure of the scores' order alone."""

FEW_FALSE_POSITIVES = 10
RESAMPLE_CELLS = 2**22


def _checked(members: ArrayLike, non_members: ArrayLike) -> tuple[Floats, Floats]:
    checked = []
    for name, scores in (("members", members), ("non_members", non_members)):
        array = np.asarray(scores, dtype=np.float64)
        if array.ndim != 1 or array.size == 0:
            raise ValueError(f"{name}: expected a non-empty list of scores, got shape {array.shape}")
        if np.isnan(array).any():
            raise ValueError(f"{name}: {np.count_nonzero(np.isnan(array))} scores are NaN")
        checked.append(array)
    return checked[0], checked[1]


def roc_auc(members: ArrayLike, non_members: ArrayLike) -> float:
    """Return P(member's score > non-member's) + P(equal) / 2, the rank AUROC (Mann-Whitney U / (n m)).

    Raises:
        ValueError: a list is empty or holds a NaN.
    """
    member_scores, non_member_scores = _checked(members, non_members)
    n, m = len(member_scores), len(non_member_scores)
    ranks = scipy.stats.rankdata(np.concatenate([member_scores, non_member_scores]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def two_sided(auc: float) -> float:
    """Return max(AUC, 1 - AUC): what an attacker has who may flip the sign of the score."""
    return max(auc, 1.0 - auc)


def two_sided_interval(low: float, high: float) -> tuple[float, float]:
    """Return the interval of max(AUC, 1 - AUC) that follows from the interval of the AUC.

    Bootstrapping the maximum itself would be biased upward: it exceeds 0.5 even for scores that say nothing.

    Raises:
        ValueError: ``low`` is above ``high``.
    """
    if not low <= high:
        raise ValueError(f"interval [{low}, {high}] is upside down")
    straddles = low <= 0.5 <= high
    return (0.5 if straddles else min(two_sided(low), two_sided(high))), max(two_sided(low), two_sided(high))


@dataclass(frozen=True, eq=False)
class RocCurve:
    """The empirical ROC curve: one point per attainable threshold, from (0, 0) to (1, 1); no convex hull."""

    fpr: Floats
    tpr: Floats
    thresholds: Floats
    """A document is called a member from this score on; the first is +inf."""
    n_members: int
    n_non_members: int

    def tpr_within(self, fpr: float) -> tuple[float, float]:
        """Return the largest TPR whose FPR is at most ``fpr``, and the smallest FPR that attains it."""
        false_positives = np.rint(self.fpr * self.n_non_members)
        allowed = math.floor(fpr * self.n_non_members + ROUNDING)
        best = self.tpr[np.searchsorted(false_positives, allowed, side="right") - 1]
        return float(best), float(self.fpr[np.searchsorted(self.tpr, best)])

    def thinned(self, max_points: int = 200, keep: Sequence[float] = ()) -> RocCurve:
        """Return a curve for drawing: only the corners of its stairs, and of those at most about ``max_points``.

        Every point kept is a point of the curve; (0, 0), (1, 1) and those of ``tpr_within(f)`` for f in ``keep``
        stay. The rest is chosen evenly in log FPR and in TPR, since both ends are read.
        """
        corner = np.ones(len(self.fpr), dtype=bool)
        rises, runs = np.diff(self.tpr) > 0, np.diff(self.fpr) > 0
        corner[1:-1] = (rises[:-1] & runs[1:]) | (runs[:-1] & rises[1:])
        index = np.flatnonzero(corner)
        if len(index) > max_points:
            grid = np.geomspace(1 / self.n_non_members, 1, max_points // 2)
            by_fpr = np.searchsorted(self.fpr[index], grid, side="right") - 1
            by_tpr = np.searchsorted(self.tpr[index], np.linspace(0, 1, max_points // 2))
            index = index[np.unique(np.concatenate([[0, len(index) - 1], by_fpr, by_tpr]))]
        kept = [np.searchsorted(self.tpr, self.tpr_within(target)[0]) for target in keep]
        index = np.unique(np.concatenate([index, np.array(kept, dtype=np.int64)]))
        return RocCurve(self.fpr[index], self.tpr[index], self.thresholds[index], self.n_members, self.n_non_members)


def roc_curve(members: ArrayLike, non_members: ArrayLike) -> RocCurve:
    """Return the empirical ROC curve; tied scores move it diagonally.

    Raises:
        ValueError: a list is empty or holds a NaN.
    """
    member_scores, non_member_scores = _checked(members, non_members)
    # Levels instead of scores: the curve depends on their order alone, and scikit-learn refuses infinite scores.
    levels, codes = np.unique(np.concatenate([member_scores, non_member_scores]), return_inverse=True)
    is_member = np.arange(len(codes)) < len(member_scores)
    fpr, tpr, thresholds = sklearn.metrics.roc_curve(is_member, codes, drop_intermediate=False)
    scores = np.concatenate([[np.inf], levels[thresholds[1:].astype(np.int64)]])
    return RocCurve(fpr, tpr, scores, len(member_scores), len(non_member_scores))


def tpr_at_fpr(members: ArrayLike, non_members: ArrayLike, fpr: float) -> tuple[float, float]:
    """Return (the largest TPR whose FPR is <= ``fpr``, the FPR attained).

    :meth:`RocCurve.tpr_within` is the same without the two guards.

    Args:
        members: scores of members.
        non_members: scores of non-members.
        fpr: the largest rate of non-members that may be called members.

    Raises:
        ValueError: ``fpr`` is below one non-member (1 / n), so that no TPR can be measured; or a list is empty or
            holds a NaN.

    Warns:
        UserWarning: fewer than ten false positives are allowed, so that one non-member moves the figure visibly.
    """
    curve = roc_curve(members, non_members)
    allowed = fpr * curve.n_non_members
    if fpr > 1 or allowed < 1 - ROUNDING:
        raise ValueError(
            f"a false-positive rate of {fpr:g} cannot be measured with {curve.n_non_members} non-members: "
            f"choose one from 1/{curve.n_non_members} to 1"
        )
    if allowed < FEW_FALSE_POSITIVES - ROUNDING:
        warnings.warn(
            f"a false-positive rate of {fpr:g} is {allowed:g} of {curve.n_non_members} non-members: a coarse figure",
            UserWarning,
            stacklevel=2,
        )
    return curve.tpr_within(fpr)


def auc_of_counts(members_ru: Counts, non_members_ru: Counts) -> Floats:
    """Return the rank AUROC [r] of scores given by how often each level occurs."""
    below = np.cumsum(non_members_ru, axis=-1) - non_members_ru
    wins = (members_ru * (below + 0.5 * non_members_ru)).sum(axis=-1)
    result: Floats = wins / (members_ru.sum(axis=-1) * non_members_ru.sum(axis=-1))
    return result


def tpr_of_counts(fpr: float) -> RankStatistic:
    """Return the statistic "largest TPR whose FPR is <= ``fpr``" of scores given by how often each level occurs."""

    def statistic(members_ru: Counts, non_members_ru: Counts) -> Floats:
        true_positives = np.cumsum(members_ru[:, ::-1], axis=-1)
        false_positives = np.cumsum(non_members_ru[:, ::-1], axis=-1)
        allowed = np.floor(fpr * false_positives[:, -1:] + ROUNDING)
        best = np.where(false_positives <= allowed, true_positives, 0).max(axis=-1)
        result: Floats = best / true_positives[:, -1]
        return result

    return statistic


def bootstrap(
    members: ArrayLike,
    non_members: ArrayLike,
    statistics: Sequence[RankStatistic],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Floats:
    """Return each statistic over resampled documents [len(statistics), r].

    Stratified: members and non-members are drawn with replacement among themselves, so that their numbers stay. The
    same seed draws the same documents, whatever the scores: attacks are compared on the same resamples.

    Args:
        members: scores of members.
        non_members: scores of non-members.
        statistics: functions of level counts, such as :func:`auc_of_counts`.
        resamples: number r of resamples.
        seed: of the draws.

    Raises:
        ValueError: a list is empty or holds a NaN.
    """
    scores = _checked(members, non_members)
    levels, codes = np.unique(np.concatenate(scores), return_inverse=True)
    classes = np.split(codes, [len(scores[0])])
    generators = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2)]
    at_once = max(1, RESAMPLE_CELLS // len(codes))
    values = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        row_start = np.arange(rows)[:, None] * len(levels)
        counts = []
        for class_codes, generator in zip(classes, generators, strict=True):
            drawn = class_codes[generator.integers(len(class_codes), size=(rows, len(class_codes)))]
            flat = np.bincount((drawn + row_start).ravel(), minlength=rows * len(levels))
            counts.append(flat.reshape(rows, len(levels)))
        values.append(np.stack([statistic(*counts) for statistic in statistics]))
    return np.concatenate(values, axis=1)


def percentile_interval(
    values: Floats,
    estimate: float,
    confidence: float,
    *,
    widening: float = 1.0,
    tests: int = 1,
    documents: int | None = None,
) -> tuple[float, float]:
    """Return the central ``confidence`` share of bootstrap values [r], widened to hold the estimate itself.

    Args:
        values: the statistic, a share, over resamples.
        estimate: the statistic over the documents themselves.
        confidence: e.g. 0.95.
        widening: how often the resamples' deviation from the estimate is counted; more than 1 for scores that depend
            on each other (:mod:`dualtok.audit.attacks.crossfit`).
        tests: intervals that are to hold together (Bonferroni). Few resamples lie beyond the ends of a corrected one,
            so that these ends are the values with the wanted share beyond them *on average*: the p (r + 1)-th, not the
            usual 1 + p (r - 1)-th, which has .0027 instead of .0017 beyond it for 15 tests and 1,000 resamples. Where
            that is beyond the outermost value, its distance is stretched as for a normal law.
        documents: of the smaller class. With several tests the share beyond an end is then that of
            :func:`corrected_deviations`.
    """
    if tests == 1:
        tail = (1 - confidence) / 2
        ends = np.quantile(values, [tail, 1 - tail])
    else:
        deviations = corrected_deviations(confidence, tests, documents)
        tail, outermost = float(scipy.stats.norm.sf(deviations)), 1 / (len(values) + 1)
        ends = np.quantile(values, [tail, 1 - tail], method="weibull")
        if tail < outermost:
            ends = estimate + (ends - estimate) * (deviations / scipy.stats.norm.isf(outermost))
    low, high = estimate + widening * (ends - estimate)
    return max(0.0, min(float(low), estimate)), min(1.0, max(float(high), estimate))


def corrected_deviations(confidence: float, tests: int, documents: int | None = None) -> float:
    """Return how many deviations the ends of an interval that holds for several tests lie from the estimate.

    Of few documents the bootstrap's deviation is too small and itself uncertain, which matters most far out; as in
    Hesterberg's expanded percentile interval (2015, arXiv 1411.5279) Student's t takes the normal law's place, with one
    degree of freedom less than documents, and n / (n - 1) corrects the variance.

    Args:
        confidence: e.g. 0.95.
        tests: intervals that are to hold together; a single one is not expanded.
        documents: n, of the smaller class; None for very many.
    """
    tail = (1 - confidence) / 2 / tests
    if tests == 1 or documents is None:
        return float(scipy.stats.norm.isf(tail))
    n = max(documents, 2)
    return math.sqrt(n / (n - 1)) * float(scipy.stats.t.isf(tail, n - 1))


def bootstrap_interval(
    members: ArrayLike,
    non_members: ArrayLike,
    statistic: RankStatistic = auc_of_counts,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    widening: float = 1.0,
    tests: int = 1,
) -> tuple[float, float]:
    """Return the stratified percentile-bootstrap interval (low, high) of a rank statistic, by default the AUC.

    It says how far the figure would move with other documents, not with another training run. Where classes are
    separated completely it has no width: the bootstrap cannot see beyond the documents it has.

    Args:
        members: scores of members.
        non_members: scores of non-members.
        statistic: :func:`auc_of_counts`, ``tpr_of_counts(fpr)``, or another function of level counts.
        resamples: bootstrap resamples, at least 1.
        confidence: e.g. 0.95.
        seed: the same seed gives the same interval.
        widening: as in :func:`percentile_interval`.
        tests: as there, of so many documents.

    Raises:
        ValueError: a list is empty or holds a NaN, or a setting is out of range.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"resamples {resamples} must be at least 1 and confidence {confidence} between 0 and 1")
    member_scores, non_member_scores = _checked(members, non_members)
    levels, codes = np.unique(np.concatenate([member_scores, non_member_scores]), return_inverse=True)
    observed = [np.bincount(part, minlength=len(levels))[None, :] for part in np.split(codes, [len(member_scores)])]
    values = bootstrap(member_scores, non_member_scores, [statistic], resamples=resamples, seed=seed)[0]
    fewest = min(len(member_scores), len(non_member_scores))
    return percentile_interval(
        values, float(statistic(*observed)[0]), confidence, widening=widening, tests=tests, documents=fewest
    )
