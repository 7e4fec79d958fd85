"""Attacks that know the defence: they look at how a document's calibrated losses are spread, not at their mean alone.

The dual loss holds the mean of s(t) over a member's tokens near the reference's level. What it cannot hide at once is
how: tokens pushed above the reference, and the shape of the distribution. The attacker has a reference model of their
own, and, for the classifiers, knows of half the documents whether they are members.

Legend: n documents, k tokens of all documents together, f features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import scipy.stats

from dualtok.audit.ragged import Floats, Offsets, segment_mean, segment_quantiles

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sklearn.base import ClassifierMixin

    from dualtok.audit.signals import Signals

Kind = Literal["logistic", "forest"]
QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
FEATURES = (
    *(f"quantile {share:g}" for share in QUANTILES),
    "mean", "deviation", "share below 0", "share below -1", "share above 1", "mean part above 0", "mean part below 0",
    "run length below 0", "autocorrelation", "mean loss", "deviation of the loss", "mean standardised log p",
)  # fmt: skip
"""Names of the columns of :func:`features`."""
FOLDS = 2
CLASSIFIERS: dict[str, tuple[Kind, str, str]] = {
    "ref_classifier": ("logistic", "Classifier", "logistic regression on how a document's calibrated losses are "
                       "spread, trained on the other half of the documents (dualtok)"),
    "ref_forest": ("forest", "Forest", "a random forest on the same"),
}  # fmt: skip
"""Name -> kind, label in tables and source of the attacks that learn from documents whose membership is known."""


def calibrated(target: Signals, reference: Signals) -> Floats:
    """Return s(t) = CE(theta; t) - CE(theta_ref; t) of every token [k] in nats; the two must be aligned."""
    return reference.log_prob.astype(np.float64) - target.log_prob.astype(np.float64)


def pushed_above(target: Signals, reference: Signals) -> Floats:
    """Return the mean part of s(t) above 0 of each document [n]: what unlearning leaves behind; less in members that
    were merely learned, more in those that were unlearned past the reference."""
    return segment_mean(np.maximum(calibrated(target, reference), 0.0), target.offsets)


def features(target: Signals, reference: Signals) -> NDArray[np.float64]:
    """Return :data:`FEATURES` of each document [n, f]; every document must have a token."""
    offsets = target.offsets
    s = calibrated(target, reference)
    loss = -target.log_prob.astype(np.float64)
    sigma = np.sqrt(np.maximum(target.var_log_prob.astype(np.float64), 1e-8))
    standardised = (target.log_prob.astype(np.float64) - target.mean_log_prob) / sigma
    mean = segment_mean(s, offsets)
    columns = [
        *segment_quantiles(s, offsets, QUANTILES).T,
        mean, _deviation(s, mean, offsets),
        *(segment_mean(part, offsets) for part in (s < 0, s < -1, s > 1, np.maximum(s, 0), np.minimum(s, 0))),
        _run_length(s < 0, offsets), _autocorrelation(s, mean, offsets),
        segment_mean(loss, offsets), _deviation(loss, segment_mean(loss, offsets), offsets),
        segment_mean(standardised, offsets),
    ]  # fmt: skip
    return np.stack(columns, axis=1)


def _deviation(values: Floats, means: Floats, offsets: Offsets) -> Floats:
    centred = values - np.repeat(means, np.diff(offsets))
    return np.sqrt(segment_mean(centred**2, offsets))


def _run_length(below: NDArray[np.bool_], offsets: Offsets) -> Floats:
    """Return the mean length [n] of a document's runs of tokens below 0; 0 where there are none."""
    starts = below.copy()
    starts[1:] &= ~below[:-1]
    firsts = offsets[:-1]
    starts[firsts] = below[firsts]  # a run does not reach over from the document before
    runs = segment_mean(starts, offsets)
    return np.divide(segment_mean(below, offsets), runs, out=np.zeros(len(runs)), where=runs > 0)


def _autocorrelation(s: Floats, means: Floats, offsets: Offsets) -> Floats:
    """Return the correlation [n] of neighbouring tokens' s; 0 where s does not vary."""
    centred = s - np.repeat(means, np.diff(offsets))
    product = np.zeros_like(s)
    product[1:] = centred[1:] * centred[:-1]
    product[offsets[:-1]] = 0.0
    variance = segment_mean(centred**2, offsets)
    return np.divide(segment_mean(product, offsets), variance, out=np.zeros(len(means)), where=variance > 0)


def classifier_scores(
    members: NDArray[np.float64], non_members: NDArray[np.float64], kind: Kind, seed: int
) -> tuple[Floats, Floats]:
    """Return how member-like each document is to a classifier that was not trained on it.

    The documents are cut at random into two halves, each judged by a classifier of the other. A half's scores are
    replaced by their ranks within it, in (0, 1), since two classifiers' outputs are not on one scale.

    Args:
        members: features [n, f].
        non_members: features [m, f].
        kind: ``logistic`` (regression on standardised features) or ``forest`` (a random forest).
        seed: of the halves and of the forest.

    Returns:
        Scores of members [n] and of non-members [m].

    Raises:
        ValueError: a class has fewer documents than halves.
    """
    if min(len(members), len(non_members)) < FOLDS:
        raise ValueError(f"a classifier needs at least {FOLDS} members and non-members")
    x = np.concatenate([members, non_members])
    is_member = np.arange(len(x)) < len(members)
    draw = np.random.default_rng(seed)
    fold = np.concatenate([draw.permutation(np.arange(len(rows)) % FOLDS) for rows in (members, non_members)])
    scores = np.empty(len(x))
    for number in range(FOLDS):
        test = fold == number
        model = _classifier(kind, seed).fit(x[~test], is_member[~test])
        scores[test] = scipy.stats.rankdata(model.predict_proba(x[test])[:, 1]) / (np.count_nonzero(test) + 1)
    return scores[: len(members)], scores[len(members) :]


def _classifier(kind: Kind, seed: int) -> ClassifierMixin:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if kind == "forest":
        return RandomForestClassifier(n_estimators=200, min_samples_leaf=5, random_state=seed)
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
