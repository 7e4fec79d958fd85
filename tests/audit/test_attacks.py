from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from dualtok.audit.attacks import ATTACKS, AttackContext
from dualtok.audit.signals import Signals
from dualtok.errors import DataError

MakeSignals = Callable[..., Signals]
LENGTHS = (7, 3, 1, 12, 40)
SIZES = {0: 120, 1: 60, 2: 31, 3: 250, 4: 700}


def naive(attack: str, target: Signals, reference: Signals, share: float) -> list[float]:
    """Each document by itself, as in the papers."""
    scores = []
    for i, document in enumerate(target.document):
        own = slice(int(target.offsets[i]), int(target.offsets[i + 1]))
        log_p = [float(x) for x in target.log_prob[own]]
        ref_log_p = [float(x) for x in reference.log_prob[own]]
        loss, ref_loss = -sum(log_p) / len(log_p), -sum(ref_log_p) / len(log_p)
        k = max(1, int(len(log_p) * share))
        sigma = [float(v) ** 0.5 for v in target.var_log_prob[own]]
        mu = [float(m) for m in target.mean_log_prob[own]]
        standard = [(x - m) / s for x, m, s in zip(log_p, mu, sigma, strict=True)]
        scores.append(
            {
                "loss": -loss,
                "ref": ref_loss - loss,
                "zlib": -loss / SIZES[int(document)],
                "min_k": sum(sorted(log_p)[:k]) / k,
                "min_k_plus_plus": sum(sorted(standard)[:k]) / k,
            }[attack]
        )
    return scores


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_attacks_equal_a_loop_over_documents(make_signals: MakeSignals, attack: str, share: float) -> None:
    target, reference = make_signals(1, lengths=LENGTHS), make_signals(2, lengths=LENGTHS)
    context = AttackContext(reference=reference, zlib_bytes=SIZES, min_k_share=share)
    scores = ATTACKS[attack](target, context)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, naive(attack, target, reference, share), rtol=1e-6)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_better_predicted_document_looks_more_like_a_member(make_signals: MakeSignals, attack: str) -> None:
    target, reference = make_signals(1, lengths=LENGTHS), make_signals(2, lengths=LENGTHS)
    context = AttackContext(reference=reference, zlib_bytes=SIZES)
    better = replace(target, log_prob=target.log_prob * np.float32(0.5))
    assert (ATTACKS[attack](better, context) > ATTACKS[attack](target, context)).all()


@pytest.mark.parametrize("attack", ATTACKS)
def test_scores_follow_the_documents_when_they_are_reordered(make_signals: MakeSignals, attack: str) -> None:
    target, reference = make_signals(1, lengths=LENGTHS), make_signals(2, lengths=LENGTHS)
    context = AttackContext(reference=reference, zlib_bytes=SIZES)
    order = np.array([3, 0, 4, 2, 1])
    scores = ATTACKS[attack](target, context)
    np.testing.assert_allclose(ATTACKS[attack](target.take(order), context), scores[order], rtol=1e-12)


def test_a_certain_model_gives_finite_standardised_scores(make_signals: MakeSignals) -> None:
    signals = make_signals()
    sure = replace(signals, var_log_prob=np.zeros_like(signals.var_log_prob), mean_log_prob=signals.log_prob)
    assert (ATTACKS["min_k_plus_plus"](sure, AttackContext()) == 0).all()


def test_needs_are_declared_and_enforced(make_signals: MakeSignals) -> None:
    target = make_signals()
    assert AttackContext().has == frozenset()
    assert AttackContext(reference=target, zlib_bytes={}).has == {"reference", "zlib"}
    assert {name: set(attack.needs) for name, attack in ATTACKS.items() if attack.needs} == {
        "ref": {"reference"},
        "zlib": {"zlib"},
    }
    assert all(name == attack.name and attack.source and attack.label for name, attack in ATTACKS.items())
    for name in ("ref", "zlib"):
        with pytest.raises(DataError, match="this attack needs"):
            ATTACKS[name](target, AttackContext())


def test_contexts_that_do_not_cover_the_documents_are_refused(make_signals: MakeSignals) -> None:
    target = make_signals()
    with pytest.raises(DataError, match="document 3 has no zlib_bytes"):
        ATTACKS["zlib"](target, AttackContext(zlib_bytes={0: 10, 1: 10, 2: 10}))
    with pytest.raises(DataError, match="2 documents are missing"):
        ATTACKS["ref"](target, AttackContext(reference=make_signals(first_id=2)))
    with pytest.raises(DataError, match="document 1 has 3 predicted tokens under the target and 4 under the reference"):
        ATTACKS["ref"](target, AttackContext(reference=make_signals(lengths=(7, 4, 1, 12))))


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_document_without_a_predicted_token_is_an_error(make_signals: MakeSignals, attack: str) -> None:
    target = make_signals(lengths=(4, 0, 2))
    with pytest.raises(DataError, match=r"document 1\) and cannot be scored"):
        ATTACKS[attack](target, AttackContext(reference=target, zlib_bytes=SIZES))
