"""What shadow models teach: their own members, found again in a model that nobody labelled."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesClassifier

from dualtok.audit.attacks.adaptive import features
from dualtok.audit.attacks.base import ATTACKS, AttackContext, ShadowFit
from dualtok.audit.attacks.learned import CLASSIFIER, choose_rows, fit_shadow_classifier
from dualtok.audit.report.tables import adaptive_table
from dualtok.audit.settings import AuditConfig
from dualtok.audit.statistics.evaluate import audit_model
from dualtok.audit.statistics.metrics import roc_auc
from dualtok.data.folds import in_shadow
from dualtok.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dualtok.audit.signals.signals import Signals
    from tests.audit.conftest import MakeSignals

LENGTH, COUNT = 30, 120


def trained_on(reference: Signals, inside: NDArray[np.bool_], seed: int, *, mark: bool = True) -> Signals:
    """Return a model that pushed some tokens of its documents above the reference, others below: the mean stays."""
    draw = np.random.default_rng(seed)
    s = draw.normal(0, 0.3, reference.n_tokens)
    if mark:
        up = draw.random(len(s)) < 0.2
        s += np.repeat(inside, LENGTH) * np.where(up, 0.6, -0.15)
    return replace(reference, log_prob=(reference.log_prob - s).astype(np.float32))


def learn(reference: Signals, *, mark: bool = True, shadows: int = 4) -> AttackContext:
    """Return a context whose classifier learned from shadows of the reference's documents."""
    rows = []
    for number in range(shadows):
        inside = in_shadow(reference.document, number, 9)
        rows.append((features(trained_on(reference, inside, 50 + number, mark=mark), reference), inside))
    n = reference.n_documents
    fit = ShadowFit(reference.document, np.zeros(n), np.zeros(n), np.ones(n), np.ones(n))
    return AttackContext(reference=reference, shadows=fit, learned={CLASSIFIER: fit_shadow_classifier(rows, 3)})


def test_scores_are_those_of_trees_that_never_saw_the_audited_model(make_signals: MakeSignals) -> None:
    reference = make_signals(1, lengths=[LENGTH] * 40)
    target = trained_on(reference, np.arange(40) < 20, 7)
    context = learn(reference, shadows=2)
    x, y = [], []
    for number in range(2):
        inside = in_shadow(reference.document, number, 9)
        rows = features(trained_on(reference, inside, 50 + number), reference)
        for document in range(40):
            x.append(rows[document])
            y.append(bool(inside[document]))
    trees = ExtraTreesClassifier(n_estimators=100, min_samples_leaf=5, random_state=3).fit(x, y)
    expected = [trees.predict_proba([row])[0][1] for row in features(target, reference)]
    np.testing.assert_allclose(ATTACKS[CLASSIFIER](target, context), expected, rtol=1e-12)
    order = np.random.default_rng(0).permutation(40)
    moved = ATTACKS[CLASSIFIER](target.take(order), context)
    np.testing.assert_allclose(moved, np.array(expected)[order], rtol=1e-12)


@pytest.mark.parametrize(
    ("in_shadows", "in_target", "low", "high"),
    [(True, True, 0.9, 1.0), (True, False, 0.38, 0.62), (False, False, 0.38, 0.62)],
    ids=["leak", "shadows leak alone", "no leak"],
)
def test_planted_members_are_found_and_nothing_else(
    make_signals: MakeSignals, in_shadows: bool, in_target: bool, low: float, high: float
) -> None:
    reference = make_signals(1, lengths=[LENGTH] * 2 * COUNT)
    members = np.arange(2 * COUNT) < COUNT
    target = trained_on(reference, members, 7, mark=in_target)
    context = learn(reference, mark=in_shadows)
    scores = ATTACKS[CLASSIFIER](target, context)
    assert low <= roc_auc(scores[members], scores[~members]) <= high
    assert 0.38 < roc_auc(-target.mean_loss[members], -target.mean_loss[~members]) < 0.62, "the mean says nothing"


def test_it_runs_with_shadows_and_a_reference_alone(make_signals: MakeSignals) -> None:
    reference = make_signals(1, lengths=[LENGTH] * 40)
    target = trained_on(reference, np.arange(40) < 20, 7)
    halves = target.take(np.arange(20)), target.take(np.arange(20, 40))
    config = AuditConfig(attacks=("loss", CLASSIFIER), shadows=2, bootstrap_resamples=100)
    context = learn(reference)
    row = audit_model("m", *halves, member_context=context, non_member_context=context, config=config)
    assert [attack.name for attack in row.attacks] == ["loss", CLASSIFIER]
    assert [str(column.header) for column in adaptive_table([row]).columns] == ["model", "Shadow", "p"]
    without = replace(context, reference=None)
    row = audit_model("m", *halves, member_context=without, non_member_context=without, config=config)
    assert row.not_run == {"Shadow": "needs reference"}
    assert audit_model("m", *halves, config=config).not_run == {"Shadow": "needs reference and shadows"}
    with pytest.raises(DataError, match="'shadow_classifier' must learn from shadow models first"):
        ATTACKS[CLASSIFIER](target, replace(context, learned={}))


def test_shadows_that_learned_all_or_nothing_teach_nothing(make_signals: MakeSignals) -> None:
    reference = make_signals(1, lengths=[LENGTH] * 4)
    rows = features(reference, reference)
    for label in (True, False):
        with pytest.raises(ValueError, match=f"4 documents of shadow models, of which {4 * label} were learned"):
            fit_shadow_classifier([(rows, np.full(4, label))], 0)


def test_of_many_documents_some_of_each_shadow_are_drawn() -> None:
    assert choose_rows(7, 4, 0, 0, most=400).tolist() == list(range(7))
    first, second = (choose_rows(1000, 4, shadow, 0, most=400) for shadow in (0, 1))
    assert len(first) == len(second) == 100
    assert (np.diff(first) > 0).all()
    assert set(first) != set(second)
    assert choose_rows(1000, 4, 0, 0, most=400).tolist() == first.tolist()
    assert choose_rows(1000, 4, 0, 1, most=400).tolist() != first.tolist()
    # About as many from each part: members come first.
    assert 25 < np.count_nonzero(first < 500) < 75
