"""Attacks that know the defence: they look at how a document's calibrated losses are spread, not at their mean alone.

The dual loss learns tokens that lie above the reference and unlearns those below it. That holds a member's mean s(t)
near the reference's level; how s(t) is spread is another matter: tokens pushed above the reference, others still
below. The attacker has a reference model of their own; two of the attacks are also told of half the documents whether
they are members, and judge the other half.

The sign-flipped Ref is no attack of its own here: its AUC is 1 - AUC, and every attack's two-sided figure counts it.

Legend: n documents (members), m non-members, k tokens of all documents together, f features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dualtok.audit.attacks.base import ATTACKS, attack_on_features
from dualtok.audit.attacks.crossfit import FEWEST, FOLDS, WIDENING, cross_fitted_scores, folds
from dualtok.audit.signals.ragged import lowest_mean, segment_mean, segment_quantiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dualtok.audit.attacks.base import PairOfScores
    from dualtok.audit.signals.signals import Signals

    Floats = NDArray[np.float64]
    Offsets = NDArray[np.int64]

# Imported where they are used, for what they take to load: scikit-learn (1 s).

QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
BELOW = (0.0, -0.5, -1.0, -2.0)
ABOVE = (0.0, 1.0)
TAIL = 0.1
"""Share of a document's tokens with the highest s(t) that the tail's mean is over."""
MIN_K = 0.2
SIGMA_FLOOR = 1e-4
MOST_LEARNED = 20_000
"""Documents that a classifier learns from at most; of more a sample is drawn, and all are judged."""
TREES = 100
"""Of the forest; 200 take twice the time for the same AUC (.656 and .655 of 836 documents, .662 and .663 of 200)."""
FEATURES = (
    *(f"quantile {share:g}" for share in QUANTILES),
    *(f"share below {threshold:g}" for threshold in BELOW),
    *(f"share above {threshold:g}" for threshold in ABOVE),
    "mean",
    "deviation",
    "mean part above 0",
    "mean part below 0",
    "mean of those above 0",
    "mean of the tail",
    "mean run below 0",
    "longest run below 0",
    "autocorrelation",
    "mean loss",
    "deviation of the loss",
    "min-k",
    "min-k++",
)
"""Names of the columns of :func:`features`."""


def calibrated(target: Signals, reference: Signals) -> Floats:
    """Return s(t) = CE(theta; t) - CE(theta_ref; t) of every token [k] in nats.

    Raises:
        ValueError: the two do not hold the same documents, token by token.
    """
    same = np.array_equal(target.document, reference.document) and np.array_equal(target.offsets, reference.offsets)
    if not same:
        raise ValueError("target and reference signals are of other documents or tokens; align them with select()")
    return reference.log_prob.astype(np.float64) - target.log_prob


def features(target: Signals, reference: Signals) -> Floats:
    """Return :data:`FEATURES` of each document [n, f]: how its s(t) is spread and follows itself, and its loss.

    Raises:
        ValueError: the two are not aligned.
        DataError: a document has no predicted token.
    """
    target.require_tokens()
    offsets, s = target.offsets, calibrated(target, reference)
    log_p = target.log_prob.astype(np.float64)
    sigma = np.maximum(np.sqrt(target.var_log_prob.astype(np.float64)), SIGMA_FLOOR)
    mean, above = segment_mean(s, offsets), s > 0
    part_above, share_above = segment_mean(np.maximum(s, 0), offsets), segment_mean(above, offsets)
    columns = [
        *segment_quantiles(s, offsets, QUANTILES).T,
        *(segment_mean(s < threshold, offsets) for threshold in BELOW),
        *(segment_mean(s > threshold, offsets) for threshold in ABOVE),
        mean,
        _deviation(s, mean, offsets),
        part_above,
        segment_mean(np.minimum(s, 0), offsets),
        _ratio(part_above, share_above),
        -lowest_mean(-s, offsets, TAIL),
        *_runs(s < 0, offsets),
        _autocorrelation(s, mean, offsets),
        target.mean_loss,
        _deviation(log_p, -target.mean_loss, offsets),
        lowest_mean(log_p, offsets, MIN_K),
        lowest_mean((log_p - target.mean_log_prob) / sigma, offsets, MIN_K),
    ]
    return np.stack(columns, axis=1)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Return numerator / denominator, and 0 where both are 0."""
    ratio: Floats = np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)
    return ratio


def _deviation(values: Floats, means: Floats, offsets: Offsets) -> Floats:
    return np.sqrt(segment_mean((values - np.repeat(means, np.diff(offsets))) ** 2, offsets))


def _runs(below: NDArray[np.bool_], offsets: Offsets) -> tuple[Floats, Floats]:
    """Return the mean and the greatest length [n] of a document's runs of tokens below 0; 0 where there are none."""
    n = len(offsets) - 1
    is_first = np.zeros(len(below), dtype=bool)
    is_first[offsets[:-1]] = True  # a run does not reach over from the document before
    starts = np.flatnonzero(below & (is_first | ~np.roll(below, 1)))
    ends = np.flatnonzero(below & (np.roll(is_first, -1) | ~np.roll(below, -1)))
    lengths = (ends - starts + 1).astype(np.float64)
    document = np.searchsorted(offsets, starts, side="right") - 1
    longest = np.zeros(n)
    np.maximum.at(longest, document, lengths)
    in_runs = np.bincount(document, weights=lengths, minlength=n).astype(np.float64)
    return _ratio(in_runs, np.bincount(document, minlength=n).astype(np.float64)), longest


def _autocorrelation(s: Floats, means: Floats, offsets: Offsets) -> Floats:
    """Return the correlation [n] of neighboring tokens' s; 0 where s does not vary."""
    centred = s - np.repeat(means, np.diff(offsets))
    product = np.zeros_like(s)
    product[1:] = centred[1:] * centred[:-1]
    product[offsets[:-1]] = 0.0  # a document's first token has no neighbor before it
    return _ratio(segment_mean(product, offsets), segment_mean(centred**2, offsets))


@attack_on_features(
    "ref_distance",
    "|Ref|",
    "distance of the mean s(t) from the non-members' median, to either side (dualtok)",
    fewest=FOLDS,
)
def distance_scores(members: Floats, non_members: Floats, seed: int) -> PairOfScores:
    """Return how far each document's mean s(t) lies from the non-members' median, in nats, to either side.

    The median is that of the other half's non-members: an attacker may know non-members, not the ones they judge.

    Args:
        members: features [n, f].
        non_members: features [m, f].
        seed: of the halves.
    """
    position, n = FEATURES.index("mean"), len(members)
    mean, fold = np.concatenate([members[:, position], non_members[:, position]]), folds(n, len(non_members), seed)
    centre = np.array([np.median(mean[n:][fold[n:] != number]) for number in range(FOLDS)])
    distance = np.abs(mean - centre[fold])
    return distance[:n], distance[n:]


@attack_on_features(
    "above_share", "Above", "share of tokens with s(t) > 0: what was unlearned lies above the reference (dualtok)"
)
def above_share_scores(members: Floats, non_members: Floats, seed: int) -> PairOfScores:
    """Return the share of each document's tokens above the reference."""
    return _column(f"share above {ABOVE[0]:g}", members, non_members)


@attack_on_features("above_mean", "Height", "mean s(t) of the tokens with s(t) > 0 (dualtok)")
def above_mean_scores(members: Floats, non_members: Floats, seed: int) -> PairOfScores:
    """Return how high, in nats, each document's tokens above the reference lie on average."""
    return _column("mean of those above 0", members, non_members)


@attack_on_features("above_tail", "Tail", f"mean of the {TAIL:.0%} highest s(t) (dualtok)")
def above_tail_scores(members: Floats, non_members: Floats, seed: int) -> PairOfScores:
    """Return the mean of each document's highest s(t), in nats."""
    return _column("mean of the tail", members, non_members)


def _column(name: str, members: Floats, non_members: Floats) -> PairOfScores:
    position = FEATURES.index(name)
    return members[:, position], non_members[:, position]


_CROSS_FITTED = "told of half the documents, judges the other half (dualtok)"


@attack_on_features(
    "ref_classifier",
    "Logistic",
    f"logistic regression on how s(t) and the loss are spread; {_CROSS_FITTED}",
    fewest=FEWEST,
    widening=WIDENING,
)
def classifier_scores(members: Floats, non_members: Floats, seed: int) -> PairOfScores:
    """Return cross-fitted ranks (:func:`.crossfit.cross_fitted_scores`) of a logistic regression."""
    x = np.concatenate([members, non_members])
    return cross_fitted_scores(logistic(), x, len(members), seed, most_learned=MOST_LEARNED)


@attack_on_features(
    "ref_forest", "Forest", f"extremely randomised trees on the same; {_CROSS_FITTED}", fewest=FEWEST, widening=WIDENING
)
def forest_scores(members: Floats, non_members: Floats, seed: int) -> PairOfScores:
    """Return cross-fitted ranks (:func:`.crossfit.cross_fitted_scores`) of extremely randomised trees."""
    x = np.concatenate([members, non_members])
    return cross_fitted_scores(forest(seed), x, len(members), seed, most_learned=MOST_LEARNED)


def logistic() -> Any:
    """Return a regression on standardized features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))


def forest(seed: int) -> Any:
    """Return extremely randomised trees: as good as a random forest on these features, in a fifth of its time."""
    from sklearn.ensemble import ExtraTreesClassifier

    return ExtraTreesClassifier(n_estimators=TREES, min_samples_leaf=5, random_state=seed)


def adaptive_scores(
    members: Signals,
    non_members: Signals,
    reference_members: Signals,
    reference_non_members: Signals,
    seed: int,
    *,
    names: Sequence[str] | None = None,
) -> dict[str, PairOfScores]:
    """Run the attacks that know the defence; those that the documents are too few for are left out.

    Args:
        members: the model's signals over documents it was trained on, each with a predicted token.
        non_members: the same over documents that it was not trained on.
        reference_members: signals of the attacker's reference over the members, token by token aligned with them.
        reference_non_members: likewise over the non-members.
        seed: of halves and trees.
        names: the attacks to run, of the kind ``knows_defence``; None runs all of them.

    Returns:
        Name -> scores of the members [n] and of the non-members [m], higher = member. Scores of ``ref_classifier`` and
        ``ref_forest`` are out-of-fold ranks; multiply deviations of their figures by the attack's ``widening``.

    Raises:
        ValueError: target and reference are not aligned.
        DataError: a document has no predicted token.
    """
    known = features(members, reference_members), features(non_members, reference_non_members)
    if names is None:
        names = [name for name, made in ATTACKS.items() if made.kind == "knows_defence"]
    return scores_of(known[0], known[1], seed, names)


def scores_of(members: Floats, non_members: Floats, seed: int, names: Sequence[str]) -> dict[str, PairOfScores]:
    """Return :func:`adaptive_scores` of features [n, f] and [m, f] that are known already."""
    enough = min(len(members), len(non_members))
    scores = {}
    for name in names:
        made = ATTACKS[name]
        assert made.of_classes is not None
        if made.fewest <= enough:
            scores[name] = made.of_classes(members, non_members, seed)
    return scores
