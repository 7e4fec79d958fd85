"""Cross-fitted scores: no document is judged by a classifier that saw it, and intervals that hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
from sklearn.base import BaseEstimator, ClassifierMixin

from dualtok.audit.attacks.adaptive import forest, logistic
from dualtok.audit.attacks.crossfit import WIDENING, cross_fitted_scores, folds
from dualtok.audit.statistics.metrics import bootstrap_interval, roc_auc


class Memory(ClassifierMixin, BaseEstimator):
    """Remembers the documents it is fitted to, and asserts that it never judges one of them."""

    def fit(self, x: Any, y: Any) -> Memory:
        self.seen_ = set(x[:, 0].tolist())
        assert sorted(np.bincount(y)) == [len(x) // 2, len(x) // 2]
        return self

    def predict_proba(self, x: Any) -> Any:
        assert not self.seen_ & set(x[:, 0].tolist())
        return np.stack([1 - x[:, 0], x[:, 0]], axis=1)


def test_every_document_is_judged_once_by_a_classifier_of_the_other_half() -> None:
    x = np.random.default_rng(0).permutation(40).astype(float)[:, None] / 40
    scores = np.concatenate(cross_fitted_scores(Memory(), x, 20, seed=1))
    fold = folds(20, 20, 1)
    assert np.bincount(fold[:20]).tolist() == np.bincount(fold[20:]).tolist() == [10, 10]
    for half in (0, 1):
        here = fold == half
        assert np.array_equal(scores[here], scipy.stats.rankdata(x[here, 0]) / 21)
    assert not np.array_equal(fold, folds(20, 20, 2))
    with pytest.raises(ValueError, match="needs 2 of each"):
        folds(1, 9, 0)


def audit_of_nothing(model: Any, trial: int, n: int, f: int) -> tuple[float, tuple[float, float], tuple[float, float]]:
    x = np.random.default_rng(trial).normal(size=(2 * n, f))
    scores = cross_fitted_scores(model, x, n, seed=trial)
    plain, wide = (
        bootstrap_interval(*scores, resamples=100, seed=trial, widening=widening) for widening in (1.0, WIDENING)
    )
    return roc_auc(*scores), plain, wide


def test_intervals_hold_where_there_is_nothing_to_find() -> None:
    """Coverage of .5 over simulated audits; without the widening the two halves' common accidents are left out."""
    trials = 200
    outcomes = [audit_of_nothing(logistic(), trial, 60, 10) for trial in range(trials)]
    deviation = np.sqrt((2 * 60 + 1) / (12 * 60 * 60)) * WIDENING
    assert abs(np.mean([auc for auc, _, _ in outcomes]) - 0.5) < 4 * deviation / np.sqrt(trials)
    plain, wide = (np.mean([low <= 0.5 <= high for low, high in (o[which] for o in outcomes)]) for which in (1, 2))
    # 200 trials at .95 have a standard deviation of .015.
    assert wide >= 0.95 - 3 * 0.0155
    assert plain < 0.9


def test_a_forest_finds_nothing_where_there_is_nothing() -> None:
    aucs = [audit_of_nothing(forest(0), trial, 40, 8)[0] for trial in range(8)]
    deviation = np.sqrt((2 * 40 + 1) / (12 * 40 * 40)) * WIDENING
    assert abs(np.mean(aucs) - 0.5) < 4 * deviation / np.sqrt(len(aucs))


class Counting(BaseEstimator, ClassifierMixin):
    """Judges by the first feature, and asserts how many documents it learned from."""

    def fit(self, x: Any, y: Any) -> Counting:
        assert len(x) == 30
        assert 5 < np.count_nonzero(y) < 25
        self.classes_ = np.array([False, True])
        return self

    def predict_proba(self, x: Any) -> Any:
        return np.stack([1 - x[:, 0], x[:, 0]], axis=1)


def test_a_sample_is_learned_from_and_all_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).random((200, 2))
    scores = cross_fitted_scores(Counting(), x, 100, seed=0, most_learned=30)
    assert [len(side) for side in scores] == [100, 100]
    fold = folds(100, 100, seed=0)
    for number in range(2):
        here = fold == number
        np.testing.assert_allclose(np.concatenate(scores)[here], scipy.stats.rankdata(x[here, 0]) / (here.sum() + 1))
    monkeypatch.setattr("dualtok.audit.attacks.crossfit.PART", 7)
    for one, other in zip(scores, cross_fitted_scores(Counting(), x, 100, seed=0, most_learned=30), strict=True):
        np.testing.assert_array_equal(one, other)
