"""What is taken from the signals of shadow models, one model at a time."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dualtok.audit.attacks.adaptive import features
from dualtok.audit.attacks.encoder import windows
from dualtok.audit.attacks.learned import CLASSIFIER, ENCODER
from dualtok.audit.settings import AuditConfig
from dualtok.audit.signals.signals import Signals
from dualtok.commands.audit import shadow_signals
from dualtok.commands.audit.shadow_signals import ShadowSignals
from dualtok.data.folds import in_shadow
from dualtok.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

SETTINGS = AuditConfig(shadows=2)
SEED = 5
"""Of the run; the audit's own is 0."""


def made(seed: int, *, shift: float = 0.0, lengths: tuple[int, ...] = (6, 0, 9, 4)) -> dict[str, Signals]:
    """Return the signals of a model over two splits; the second document of each has no predicted token."""
    draw, found = np.random.default_rng(seed), {}
    for place, split in enumerate(("train", "held_out")):
        k = sum(lengths)
        found[split] = Signals(
            document=np.arange(len(lengths)) + 10 * place,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            log_prob=(-draw.gamma(3, size=k) - shift).astype(np.float32),
            rank=draw.integers(0, 4, size=k).astype(np.int32),
            mean_log_prob=-draw.gamma(3, size=k).astype(np.float32),
            var_log_prob=draw.gamma(3, size=k).astype(np.float32),
        )
    return found


def collected(reference: Mapping[str, Signals] | None, settings: AuditConfig = SETTINGS) -> ShadowSignals:
    shadows = ShadowSignals(settings, SEED, reference)
    for number in range(2):
        shadows.add(number, made(number))
    return shadows


def test_each_shadow_leaves_features_and_what_it_learned() -> None:
    reference = made(9)
    shadows = collected(reference)
    documents = np.array([0, 2, 3, 10, 12, 13])
    for number, (rows, inside) in enumerate(shadows.rows):
        shadow = made(number)
        expected = [
            features(shadow[split].take(kept), reference[split].take(kept))
            for split in ("train", "held_out")
            for kept in [np.array([0, 2, 3])]
        ]
        np.testing.assert_array_equal(rows, np.concatenate(expected))
        assert inside.tolist() == in_shadow(documents, number, SEED).tolist()
    assert (shadows.rows[0][1] != shadows.rows[1][1]).all(), "of a pair each document is in one"
    fit = shadows.fit()
    assert fit is not None
    assert fit.document.tolist() == documents.tolist()
    found = shadows.learn()
    assert list(found) == [CLASSIFIER]
    kept = made(0)["train"].with_tokens()
    assert found[CLASSIFIER](kept, reference["train"].select(kept.document)).shape == (3,)


def test_no_shadows_signals_are_held_while_others_are_read() -> None:
    shadows = ShadowSignals(SETTINGS, SEED, made(9))
    signals = made(0)
    alive = [weakref.ref(side) for side in signals.values()]
    shadows.add(0, signals)
    del signals
    gc.collect()
    assert [side() for side in alive] == [None, None]


def test_of_many_documents_only_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow_signals, "MOST_ROWS", 4)
    shadows = collected(made(9))
    assert [len(inside) for _, inside in shadows.rows] == [2, 2]
    assert all(len(rows) == 2 for rows, _ in shadows.rows)
    assert [len(documents) for documents, _ in shadows.losses] == [6, 6], "LiRA has all of them"


def test_the_encoder_has_its_windows_of_the_same_documents() -> None:
    reference = made(9)
    shadows = collected(reference, replace(SETTINGS, attacks=("loss", ENCODER)))
    assert shadows.rows == []
    for number, ((x, mask), inside) in enumerate(shadows.windows):
        shadow = made(number)
        own = [(shadow[split].with_tokens(), reference[split].with_tokens()) for split in ("train", "held_out")]
        np.testing.assert_array_equal(x, np.concatenate([windows(*pair)[0] for pair in own]))
        assert mask.sum(axis=1).tolist() == [6, 9, 4, 6, 9, 4]
        assert inside.tolist() == in_shadow(np.array([0, 2, 3, 10, 12, 13]), number, SEED).tolist()
    assert list(shadows.learn()) == [ENCODER]


def test_nothing_is_learned_without_a_reference_or_without_the_attack() -> None:
    assert collected(None).learn() == {}
    assert collected(made(9), replace(SETTINGS, attacks=("loss", "lira"))).learn() == {}
    elsewhere = ShadowSignals(SETTINGS, SEED, None)  # another rank than the first
    elsewhere.add(0, {})
    assert (elsewhere.fit(), elsewhere.learn()) == (None, {})


def test_a_reference_of_other_documents_is_refused() -> None:
    with pytest.raises(DataError, match="document 3 has 4 predicted tokens under the target and 8 under"):
        collected(made(9, lengths=(6, 0, 9, 8)))
