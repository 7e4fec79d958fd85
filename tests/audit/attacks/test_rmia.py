"""RMIA against the paper's formula in plain Python, one pair of documents at a time, and against figures by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dualtok.audit.attacks.adaptive import FEATURES, features
from dualtok.audit.attacks.base import ATTACKS, AttackContext
from dualtok.audit.attacks.crossfit import folds
from dualtok.audit.attacks.registry import attack_scores
from dualtok.audit.attacks.rmia import dominated_share, log_ratio, rmia_scores
from dualtok.audit.statistics.metrics import roc_auc

if TYPE_CHECKING:
    from dualtok.audit.signals.signals import Signals
    from tests.audit.conftest import MakeSignals


def pair(make_signals: MakeSignals, count: int, seed: int, *, first_id: int = 0, gain: float = 0.0) -> list[Signals]:
    """Return the signals of a model and of a reference, whose mean losses differ by ``gain`` and by chance."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(5, 30, count).tolist()
    reference = make_signals(seed, lengths=lengths, first_id=first_id, loss=2.0)
    change = np.repeat(draw.normal(gain, 0.3, count), lengths)
    return [replace(reference, log_prob=np.minimum(reference.log_prob + change, 0).astype(np.float32)), reference]


def means(signals: Signals) -> list[float]:
    """Return the geometric mean of the probabilities of each document's tokens."""
    bounds = zip(signals.offsets[:-1], signals.offsets[1:], strict=True)
    return [
        math.prod(math.exp(float(x)) for x in signals.log_prob[first:end]) ** (1 / (end - first))
        for first, end in bounds
    ]


def test_scores_are_the_papers(make_signals: MakeSignals) -> None:
    members, others = pair(make_signals, 23, 1, gain=0.4), pair(make_signals, 18, 2)
    a, gamma, fold = 0.3, 1.0, folds(23, 18, 4)
    likelihoods = []
    for signals in (members, others):
        for p_model, p_out in zip(means(signals[0]), means(signals[1]), strict=True):
            p_in = a * p_out + 1 - a
            likelihoods.append(p_model / ((p_in + p_out) / 2))
    expected = []
    for document, own in enumerate(likelihoods):
        population = [likelihoods[23 + z] for z in range(18) if fold[23 + z] != fold[document]]
        expected.append(sum(own / z >= gamma for z in population) / len(population))
    found = rmia_scores(features(members[0], members[1]), features(others[0], others[1]), 4)
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=1e-12)
    assert len(set(expected)) > 5


def test_the_ratio_and_the_share_by_hand() -> None:
    # p = 1/2, p_out = 1/4: p_in = .3 / 4 + .7 = .775, p(x) = .5125.
    found = log_ratio(np.array([math.log(2)]), np.array([math.log(4)]))
    assert found[0] == pytest.approx(math.log(0.5 / 0.5125))
    # a = 1 takes the reference for p(x); a = 0 puts a constant in its place.
    assert log_ratio(np.array([3.0]), np.array([5.0]), a=1)[0] == pytest.approx(2)
    lone = log_ratio(np.array([3.0, 3.0]), np.array([5.0, 50.0]), a=0)
    assert lone[0] == pytest.approx(-3 - math.log((math.exp(-5) + 1) / 2))
    population = np.log([1.0, 2.0, 4.0, 8.0])
    ratio = np.log([0.5, 1.0, 3.0, 4.0, 9.0])
    assert dominated_share(ratio, population).tolist() == [0, 0.25, 0.5, 0.75, 1], "a draw dominates"
    assert dominated_share(ratio, population, gamma=2).tolist() == [0, 0, 0.25, 0.5, 0.75]


def test_no_document_is_in_its_own_population(make_signals: MakeSignals) -> None:
    """A change of one non-member changes no score of its own half but its own."""
    rows = np.random.default_rng(0).normal(2, 1, (40, len(FEATURES)))
    fold = folds(20, 20, 7)
    before = np.concatenate(rmia_scores(rows[:20], rows[20:], 7))
    changed = rows.copy()
    changed[25, FEATURES.index("mean loss")] = -50
    after = np.concatenate(rmia_scores(changed[:20], changed[20:], 7))
    moved = np.flatnonzero(before != after)
    assert set(fold[moved[moved != 25]]) == {1 - fold[25]}
    assert after[25] == 1


@pytest.mark.parametrize(("gain", "low", "high"), [(0.8, 0.8, 1.0), (0.0, 0.4, 0.6)])
def test_planted_members_are_found_and_nothing_else(
    make_signals: MakeSignals, gain: float, low: float, high: float
) -> None:
    members, others = pair(make_signals, 150, 5, gain=gain), pair(make_signals, 150, 6, first_id=1000)
    contexts = AttackContext(reference=members[1]), AttackContext(reference=others[1])
    scored = attack_scores((members[0], others[0]), contexts, ["loss", "rmia"], 3)
    assert low <= roc_auc(*scored.scores["rmia"]) <= high
    none = attack_scores((members[0], others[0]), (AttackContext(), AttackContext()), ["loss", "rmia"], 3)
    assert none.not_run == {"RMIA": "needs reference"}


def test_a_hundred_audits_without_a_leak_spread_no_wider_than_a_fixed_score() -> None:
    """So its interval needs no widening, although the population is the other half's."""
    draw, column = np.random.default_rng(1), FEATURES.index("mean loss")
    shared, fixed = [], []
    for seed in range(100):
        rows = draw.normal(3, 0.5, (120, len(FEATURES)))
        shared.append(roc_auc(*rmia_scores(rows[:60], rows[60:], seed)))
        fixed.append(roc_auc(-rows[:60, column], -rows[60:, column]))
    assert abs(np.mean(shared) - 0.5) < 0.02
    assert np.std(shared) < 1.15 * np.std(fixed)
    assert ATTACKS["rmia"].widening == 1
