"""LT-MIA: its input against a loop over tokens, its forward pass against one document at a time, and what it finds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from dualtok.audit.attacks import encoder
from dualtok.audit.attacks.base import ATTACKS, AttackContext, ShadowFit
from dualtok.audit.attacks.encoder import WINDOW, Encoder, fit_encoder, windows
from dualtok.audit.attacks.learned import ENCODER
from dualtok.audit.settings import AuditConfig
from dualtok.audit.statistics.metrics import roc_auc
from dualtok.data.folds import in_shadow
from dualtok.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dualtok.audit.signals.signals import Signals
    from tests.audit.conftest import MakeSignals

LENGTH, COUNT = 16, 240


def test_the_input_equals_a_loop_over_tokens(make_signals: MakeSignals) -> None:
    lengths = (3, 1, WINDOW + 5)
    target, reference = make_signals(1, lengths=lengths), make_signals(2, lengths=lengths)
    x, mask = windows(target, reference)
    assert x.dtype == np.float32
    for document, (first, end) in enumerate(zip(target.offsets[:-1], target.offsets[1:], strict=True)):
        s = [float(reference.log_prob[t]) - float(target.log_prob[t]) for t in range(first, end)]
        summaries = []
        for values in (s, target.log_prob[first:end].tolist(), reference.log_prob[first:end].tolist()):
            mean = sum(values) / len(values)
            summaries += [mean, (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5]
        for place in range(WINDOW):
            token = first + place
            assert mask[document, place] == (token < end)
            expected = [0.0] * 15
            if token < end:
                of_models = [
                    value
                    for one in (target, reference)
                    for value in (
                        one.log_prob[token],
                        one.mean_log_prob[token],
                        one.var_log_prob[token] ** 0.5,
                        float(one.top1[token]),
                    )
                ]
                expected = [s[place], *of_models, *summaries]
            np.testing.assert_allclose(x[document, place], expected, rtol=1e-5, atol=1e-6)


def test_padding_and_neighbours_in_a_batch_change_nothing() -> None:
    torch.manual_seed(0)
    model = Encoder(5).eval()
    x, mask = torch.randn(3, WINDOW, 5), torch.arange(WINDOW)[None, :] < torch.tensor([[4], [WINDOW], [1]])
    together = model(x, mask)
    noisy = model(torch.where(mask[..., None], x, 1e3), mask)
    torch.testing.assert_close(noisy, together)
    for row in range(3):
        torch.testing.assert_close(model(x[row : row + 1], mask[row : row + 1])[0], together[row], rtol=1e-5, atol=1e-6)
    # A document of one token: all attention is on it.
    inner = model.layers(model.enter(x[2:3]) + model.position_td, src_key_padding_mask=~mask[2:3])
    torch.testing.assert_close(model.leave(inner[:, 0]).squeeze(-1)[0], together[2], rtol=1e-5, atol=1e-6)


def trained_on(reference: Signals, inside: NDArray[np.bool_], seed: int, *, mark: bool) -> Signals:
    """Return a model that moved the tokens of its documents away from the reference, to either side."""
    draw = np.random.default_rng(seed)
    s = draw.normal(0, 0.5, reference.n_tokens)
    if mark:
        s += np.repeat(inside, LENGTH) * draw.choice([-0.8, 0.8], len(s))
    return replace(reference, log_prob=(reference.log_prob - s).astype(np.float32))


@pytest.mark.parametrize(("mark", "low", "high"), [(True, 0.9, 1.0), (False, 0.4, 0.6)], ids=["leak", "no leak"])
def test_planted_members_are_found_and_nothing_else(
    make_signals: MakeSignals, mark: bool, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "EPOCHS", 6)
    reference = make_signals(1, lengths=[LENGTH] * COUNT)
    members = np.arange(COUNT) < COUNT // 2
    shadows = []
    for number in range(4):
        inside = in_shadow(reference.document, number, 9)
        shadows.append((windows(trained_on(reference, inside, 50 + number, mark=mark), reference), inside))
    target = trained_on(reference, members, 7, mark=mark)
    learned = fit_encoder(shadows, 3)
    n = reference.n_documents
    fit = ShadowFit(reference.document, np.zeros(n), np.zeros(n), np.ones(n), np.ones(n))
    scores = ATTACKS[ENCODER](target, AttackContext(reference=reference, shadows=fit, learned={ENCODER: learned}))
    assert scores.dtype == np.float64
    assert low <= roc_auc(scores[members], scores[~members]) <= high
    some = np.array([150, 3, 77])
    np.testing.assert_allclose(learned(target.take(some), reference.take(some)), scores[some], rtol=1e-3, atol=1e-4)


def test_the_seed_alone_decides(make_signals: MakeSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "EPOCHS", 1)
    some = make_signals(1, lengths=[4] * 40)
    rows = [(windows(some, make_signals(2, lengths=[4] * 40)), np.arange(40) % 3 == 0)]
    before = torch.get_rng_state()
    first, again, other = (fit_encoder(rows, seed)(some, some) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before), "the process's own draws go on as they were"
    np.testing.assert_allclose(again, first, rtol=1e-4, atol=1e-5)
    assert np.abs(other - first).max() > 1e-2


def test_it_is_run_only_if_it_is_named() -> None:
    assert ENCODER not in AuditConfig(shadows=2).attacks
    assert AuditConfig(shadows=2, attacks=("loss", ENCODER)).attacks == ("loss", ENCODER)


def test_too_few_documents_are_refused(make_signals: MakeSignals) -> None:
    few = make_signals(1, lengths=[4] * 9)
    with pytest.raises(DataError, match="'lt_mia' has 9 documents of shadow models to learn from and needs 10"):
        fit_encoder([(windows(few, few), np.arange(9) < 4)], 0)
    enough = make_signals(1, lengths=[4] * 12)
    with pytest.raises(ValueError, match="12 documents of shadow models, of which 0 were learned"):
        fit_encoder([(windows(enough, enough), np.zeros(12, bool))], 0)
