"""Attacks that know the defence: their features document by document, and classifiers that find nothing in nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dualtok.audit.adaptive import CLASSIFIERS, FEATURES, QUANTILES, Kind, classifier_scores, features
from dualtok.audit.metrics import roc_auc
from dualtok.audit.signals import Signals

MakeSignals = Callable[..., Signals]
LENGTHS = (1, 9, 14, 2, 30, 11)


def naive(target: Signals, reference: Signals) -> list[dict[str, float]]:
    """Each document by itself, in float64."""
    rows = []
    for first, end in zip(target.offsets[:-1], target.offsets[1:], strict=True):
        log_p = target.log_prob[first:end].astype(float)
        s = reference.log_prob[first:end].astype(float) - log_p
        runs = [run for run in "".join("-" if x < 0 else "+" for x in s).split("+") if run]
        around = s - s.mean()
        variance = float((around**2).mean())
        sigma = np.sqrt(target.var_log_prob[first:end].astype(float))
        rows.append({
            **{f"quantile {share:g}": float(np.quantile(s, share)) for share in QUANTILES},
            "mean": s.mean(), "deviation": s.std(), "share below 0": (s < 0).mean(), "share below -1": (s < -1).mean(),
            "share above 1": (s > 1).mean(), "mean part above 0": np.where(s > 0, s, 0).mean(),
            "mean part below 0": np.where(s < 0, s, 0).mean(),
            "run length below 0": float(np.mean([len(run) for run in runs])) if runs else 0.0,
            "autocorrelation": float((around[1:] * around[:-1]).sum() / len(s) / variance) if variance > 0 else 0.0,
            "mean loss": -log_p.mean(), "deviation of the loss": log_p.std(),
            "mean standardised log p": ((log_p - target.mean_log_prob[first:end]) / sigma).mean(),
        })  # fmt: skip
    return rows


def test_features_equal_a_loop_over_documents(make_signals: MakeSignals) -> None:
    target, reference = make_signals(1, lengths=LENGTHS), make_signals(2, lengths=LENGTHS)
    expected = naive(target, reference)
    found = features(target, reference)
    assert found.shape == (len(LENGTHS), len(FEATURES))
    for column, name in enumerate(FEATURES):
        np.testing.assert_allclose(found[:, column], [row[name] for row in expected], rtol=1e-6, atol=1e-9,
                                   err_msg=name)  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind, _, _ in CLASSIFIERS.values()])
def test_a_classifier_finds_nothing_where_there_is_nothing(kind: Kind) -> None:
    """Its AUC on documents that it did not learn from is that of a guess; on those that it did, it would be near 1."""
    trials, n = 5, 80
    aucs = []
    for trial in range(trials):
        x = np.random.default_rng(trial).normal(size=(2 * n, 10))
        aucs.append(roc_auc(*classifier_scores(x[:n], x[n:], kind, seed=trial)))
    # Two halves of n/2 against n/2 documents: the standard deviation of an AUC is about sqrt((n + 1) / (6 n^2)).
    deviation = np.sqrt((n + 1) / (6 * n * n))
    assert abs(np.mean(aucs) - 0.5) < 4 * deviation / np.sqrt(trials)


@pytest.mark.parametrize("kind", [kind for kind, _, _ in CLASSIFIERS.values()])
def test_a_classifier_finds_what_the_mean_hides(kind: Kind) -> None:
    """Members are spread more widely about the same mean: what unlearning beside learning leaves."""
    draw = np.random.default_rng(0)
    spread = np.concatenate([draw.normal(1.5, 0.3, 100), draw.normal(1.0, 0.3, 100)])
    mean = draw.normal(size=200)
    x = np.stack([mean, spread], axis=1)
    assert abs(roc_auc(mean[:100], mean[100:]) - 0.5) < 0.1
    assert roc_auc(*classifier_scores(x[:100], x[100:], kind, seed=0)) > 0.8


def test_a_classifier_is_reproducible_and_needs_two_of_each() -> None:
    x = np.random.default_rng(0).normal(size=(40, 3))
    first, again = (classifier_scores(x[:20], x[20:], "forest", seed=3) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(ValueError, match="at least 2"):
        classifier_scores(x[:1], x[1:], "logistic", seed=0)
