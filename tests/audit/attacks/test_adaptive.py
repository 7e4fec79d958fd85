"""Attacks that know the defence: their features document by document, and what each of them finds and does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from dualtok.audit.attacks.adaptive import FEATURES, QUANTILES, adaptive_scores, distance_scores, features, scores_of
from dualtok.audit.attacks.crossfit import FEWEST, folds
from dualtok.audit.attacks.registry import names_of
from dualtok.audit.signals.signals import Signals
from dualtok.audit.statistics.metrics import roc_auc
from dualtok.errors import DataError

MakeSignals = Callable[..., Signals]
KNOWING = names_of("knows_defence")
LENGTHS = (1, 9, 14, 2, 30, 11)


def naive(target: Signals, reference: Signals) -> list[dict[str, float]]:
    """Each document by itself, in float64."""
    rows = []
    for first, end in zip(target.offsets[:-1], target.offsets[1:], strict=True):
        log_p = target.log_prob[first:end].astype(float)
        s = reference.log_prob[first:end].astype(float) - log_p
        runs = [len(run) for run in "".join("-" if x < 0 else "+" for x in s).split("+") if run] or [0]
        around = s - s.mean()
        variance = float((around**2).mean())
        standard = (log_p - target.mean_log_prob[first:end]) / np.sqrt(target.var_log_prob[first:end].astype(float))
        fifth, tenth = (max(1, int(share * len(s) + 1e-9)) for share in (0.2, 0.1))
        rows.append(
            {
                **{f"quantile {share:g}": float(np.quantile(s, share)) for share in QUANTILES},
                **{f"share below {at:g}": float((s < at).mean()) for at in (0, -0.5, -1, -2)},
                **{f"share above {at:g}": float((s > at).mean()) for at in (0, 1)},
                "mean": s.mean(),
                "deviation": s.std(),
                "mean part above 0": np.where(s > 0, s, 0).mean(),
                "mean part below 0": np.where(s < 0, s, 0).mean(),
                "mean of those above 0": s[s > 0].mean() if (s > 0).any() else 0.0,
                "mean of the tail": np.sort(s)[-tenth:].mean(),
                "mean run below 0": float(np.mean(runs)),
                "longest run below 0": max(runs),
                "autocorrelation": float((around[1:] * around[:-1]).sum() / len(s) / variance) if variance > 0 else 0.0,
                "mean loss": -log_p.mean(),
                "deviation of the loss": log_p.std(),
                "min-k": np.sort(log_p)[:fifth].mean(),
                "min-k++": np.sort(standard)[:fifth].mean(),
            }
        )
    return rows


def test_features_equal_a_loop_over_documents(make_signals: MakeSignals) -> None:
    target, reference = make_signals(1, lengths=LENGTHS), make_signals(2, lengths=LENGTHS)
    expected, found = naive(target, reference), features(target, reference)
    assert found.shape == (len(LENGTHS), len(FEATURES))
    assert set(FEATURES) == set(expected[0])
    for column, name in enumerate(FEATURES):
        np.testing.assert_allclose(
            found[:, column], [row[name] for row in expected], rtol=1e-6, atol=1e-9, err_msg=name
        )


def test_a_run_ends_with_its_document(make_signals: MakeSignals) -> None:
    """All tokens of two documents lie below the reference: a run each, not one of both."""
    reference = make_signals(1, lengths=(4, 6))
    target = replace(reference, log_prob=reference.log_prob + np.float32(0.01))
    longest = features(target, reference)[:, FEATURES.index("longest run below 0")]
    assert longest.tolist() == [4, 6]
    level = features(reference, reference)
    assert np.isfinite(level).all()
    assert level[:, FEATURES.index("mean run below 0")].tolist() == [0, 0]


def test_signals_that_do_not_fit_are_refused(make_signals: MakeSignals) -> None:
    target = make_signals(1, lengths=LENGTHS)
    for other in (make_signals(1, lengths=LENGTHS[::-1]), make_signals(1, lengths=LENGTHS, first_id=1)):
        with pytest.raises(ValueError, match="align them"):
            features(target, other)
    empty = make_signals(1, lengths=(3, 0))
    with pytest.raises(DataError, match="no predicted token"):
        features(empty, empty)


def spread(make_signals: MakeSignals, members: bool, seed: int, count: int = 60) -> tuple[Signals, Signals]:
    """Return target and reference of documents; of members a fifth of the tokens lies above, the others below."""
    lengths, draw = [40] * count, np.random.default_rng(seed)
    reference = make_signals(seed, lengths=lengths)
    s = draw.normal(0, 0.3, 40 * count)
    if members:
        up = draw.random(len(s)) < 0.2
        s += np.where(up, 0.8, -0.2)  # the mean stays
    return replace(reference, log_prob=(reference.log_prob - s).astype(np.float32)), reference


def test_what_the_mean_hides_is_found_in_the_spread(make_signals: MakeSignals) -> None:
    (members, of_members), (others, of_others) = (
        spread(make_signals, kind, seed) for kind, seed in ((True, 1), (False, 2))
    )
    scores = adaptive_scores(members, others, of_members, of_others, seed=0)
    assert list(scores) == list(KNOWING)
    mean = of_members.mean_loss - members.mean_loss, of_others.mean_loss - others.mean_loss
    assert abs(roc_auc(*mean) - 0.5) < 0.12, "the attack Ref finds nothing"
    aucs = {name: roc_auc(*pair) for name, pair in scores.items()}
    for name in ("above_mean", "above_tail", "ref_classifier", "ref_forest"):
        assert aucs[name] > 0.9, name
    assert aucs["above_share"] < 0.3, "fewer tokens lie above, but higher"
    assert {name: len(pair[0]) for name, pair in scores.items()} == dict.fromkeys(KNOWING, 60)


def test_scores_are_in_the_order_of_the_documents_and_reproducible(make_signals: MakeSignals) -> None:
    target, reference = spread(make_signals, True, 1)
    known = features(target, reference)
    names = ("above_tail", "ref_classifier", "ref_forest")
    first, again = (scores_of(known[:30], known[30:], 3, names) for _ in range(2))
    for name in names:
        assert np.array_equal(first[name][0], again[name][0])
    assert np.array_equal(first["above_tail"][0], known[:30, FEATURES.index("mean of the tail")])


def test_a_distance_is_measured_from_non_members_of_the_other_half() -> None:
    draw = np.random.default_rng(0)
    members, others = draw.normal(size=(31, len(FEATURES))), draw.normal(size=(22, len(FEATURES)))
    place, fold = FEATURES.index("mean"), folds(31, 22, 5)
    far_in, far_out = distance_scores(members, others, 5)
    for document in range(31):
        centre = np.median(others[fold[31:] != fold[document], place])
        assert far_in[document] == abs(members[document, place] - centre)
    for document in range(22):
        centre = np.median(others[fold[31:] != fold[31 + document], place])
        assert far_out[document] == abs(others[document, place] - centre)


def test_attacks_that_learn_need_documents(make_signals: MakeSignals) -> None:
    target, reference = spread(make_signals, True, 1, count=2 * FEWEST - 1)
    known = features(target, reference)
    found = scores_of(known[:FEWEST], known[FEWEST:], 0, KNOWING)
    assert set(KNOWING) - set(found) == {"ref_classifier", "ref_forest"}


def test_auc_is_that_of_scikit_learn(make_signals: MakeSignals) -> None:
    members, others = (features(*spread(make_signals, kind, seed)) for kind, seed in ((True, 3), (False, 4)))
    for name, pair in scores_of(members, others, 1, KNOWING).items():
        expected = roc_auc_score(np.repeat([1, 0], [len(part) for part in pair]), np.concatenate(pair))
        assert roc_auc(*pair) == pytest.approx(expected, abs=1e-12), name
