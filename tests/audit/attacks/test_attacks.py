from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from dualtok.audit.attacks.base import AttackContext
from dualtok.audit.attacks.registry import ATTACKS, names_of
from dualtok.audit.attacks.token_level import WINDOWS, smoothed_frequencies
from dualtok.audit.signals.signals import Signals
from dualtok.audit.statistics.metrics import roc_auc
from dualtok.errors import DataError

ONE_PASS = tuple(name for name in names_of("single_pass", "joint") if ATTACKS[name].of_document is not None)
"""Those that judge each document by itself; RMIA, which compares documents, has a file of its own."""

MakeSignals = Callable[..., Signals]
LENGTHS = (7, 3, 1, 12, 40)
SIZES = {0: 120, 1: 60, 2: 31, 3: 250, 4: 700}
TOKEN_IDS = {document: np.random.default_rng(document).integers(0, 9, n) for document, n in enumerate(LENGTHS)}
COUNTS = np.array([50, 0, 3, 1, 9, 20, 2, 0, 6, 4])
KL = {
    document: np.random.default_rng(90 + document).gamma(2.0, size=n).astype(np.float32)
    for document, n in enumerate(LENGTHS)
}
DISCRETE = {"dc_pdd", "wbc", "error_zone", "ht_mia"}
"""Attacks that count or clip, so that a better prediction need not change them."""


def two_models(make_signals: MakeSignals) -> tuple[Signals, Signals]:
    """Signals of a target and of a reference so bad that some tokens are below DC-PDD's bound and others above."""
    return make_signals(1, lengths=LENGTHS, loss=6), make_signals(2, lengths=LENGTHS, loss=6)


def everything(reference: Signals, share: float = 0.2) -> AttackContext:
    return AttackContext(
        reference=reference,
        zlib_bytes=SIZES,
        token_ids=TOKEN_IDS,
        frequencies=smoothed_frequencies(COUNTS),
        kl_from_reference=KL,
        min_k_share=share,
    )


def naive_surp(log_p: list[float], mu: list[float], k: int) -> float:
    order = sorted(range(len(log_p)), key=log_p.__getitem__)[:k]
    surprising = [log_p[t] for t in order if -mu[t] < 2.0] or [log_p[t] for t in order]
    return sum(surprising) / len(surprising)


def naive_dc_pdd(log_p: list[float], ids: list[int]) -> float:
    frequency = [(int(count) + 1) / (int(COUNTS.sum()) + len(COUNTS)) for count in COUNTS]
    seen: dict[int, float] = {}
    for x, token in zip(log_p, ids, strict=True):
        seen.setdefault(token, min(math.exp(x) * math.log(1 / frequency[token]), 0.01))
    return sum(seen.values()) / len(seen)


def naive_wbc(log_p: list[float], ref_log_p: list[float]) -> float:
    n = len(log_p)
    shares = []
    for size in [size for size in (2, 3, 4, 6, 9, 13, 18, 25, 32, 40) if size <= n] or [n]:
        votes = [-sum(ref_log_p[i : i + size]) > -sum(log_p[i : i + size]) for i in range(n - size + 1)]
        shares.append(sum(votes) / len(votes))
    return sum(shares) / len(shares)


def naive_error_zone(log_p: list[float], ref_log_p: list[float], top1: list[bool]) -> float:
    """The paper's P / N, as P / (P + N)."""
    d = [x - r for x, r, right in zip(log_p, ref_log_p, top1, strict=True) if not right]
    gained, lost = sum(x for x in d if x > 0), -sum(x for x in d if x < 0)
    return gained / (gained + lost) if d else 1.0


def naive_ht_mia(log_p: list[float], ref_log_p: list[float], k: int) -> float:
    """Of the k tokens that the target finds least likely, the share that it finds likelier than the reference does."""
    hard = sorted(range(len(log_p)), key=log_p.__getitem__)[:k]
    return sum(math.exp(log_p[t]) > math.exp(ref_log_p[t]) for t in hard) / k


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
        top1 = [bool(right) for right in target.top1[own]]
        scores.append(
            {
                "loss": -loss,
                "ref": ref_loss - loss,
                "zlib": -loss / SIZES[int(document)],
                "min_k": sum(sorted(log_p)[:k]) / k,
                "min_k_plus_plus": sum(sorted(standard)[:k]) / k,
                "surp": naive_surp(log_p, mu, k),
                "dc_pdd": naive_dc_pdd(log_p, TOKEN_IDS[int(document)].tolist()),
                "wbc": naive_wbc(log_p, ref_log_p),
                "error_zone": naive_error_zone(log_p, ref_log_p, top1),
                "ht_mia": naive_ht_mia(log_p, ref_log_p, k),
                "info_rmia": ref_loss - loss + sum(map(float, KL[int(document)])) / len(log_p),
            }[attack]
        )
    return scores


@pytest.mark.parametrize("attack", ONE_PASS)
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_attacks_equal_a_loop_over_documents(make_signals: MakeSignals, attack: str, share: float) -> None:
    target, reference = two_models(make_signals)
    context = everything(reference, share)
    scores = ATTACKS[attack](target, context)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, naive(attack, target, reference, share), rtol=1e-6)


@pytest.mark.parametrize("attack", ONE_PASS)
def test_a_better_predicted_document_looks_more_like_a_member(make_signals: MakeSignals, attack: str) -> None:
    target, reference = two_models(make_signals)
    context = everything(reference)
    better = replace(target, log_prob=target.log_prob * np.float32(0.5))
    gain = ATTACKS[attack](better, context) - ATTACKS[attack](target, context)
    assert (gain >= 0).all() if attack in DISCRETE else (gain > 0).all()
    assert gain.any()


@pytest.mark.parametrize("attack", ONE_PASS)
def test_scores_follow_the_documents_when_they_are_reordered(make_signals: MakeSignals, attack: str) -> None:
    target, reference = two_models(make_signals)
    context = everything(reference)
    order = np.array([3, 0, 4, 2, 1])
    scores = ATTACKS[attack](target, context)
    np.testing.assert_allclose(ATTACKS[attack](target.take(order), context), scores[order], rtol=1e-12)


def test_a_certain_model_gives_finite_standardized_scores(make_signals: MakeSignals) -> None:
    signals = make_signals()
    sure = replace(signals, var_log_prob=np.zeros_like(signals.var_log_prob), mean_log_prob=signals.log_prob)
    assert (ATTACKS["min_k_plus_plus"](sure, AttackContext()) == 0).all()


def test_needs_are_declared_and_enforced(make_signals: MakeSignals) -> None:
    target = make_signals()
    assert AttackContext().has == frozenset()
    assert AttackContext(reference=target, zlib_bytes={}).has == {"reference", "zlib"}
    assert everything(target).has == {"reference", "zlib", "frequencies", "kl_from_reference"}
    assert not AttackContext(frequencies=np.ones(2)).has, "without the documents' ids there is nothing to look up"
    assert {name: set(attack.needs) for name, attack in ATTACKS.items() if name in ONE_PASS if attack.needs} == {
        "ref": {"reference"},
        "zlib": {"zlib"},
        "dc_pdd": {"frequencies"},
        "wbc": {"reference"},
        "error_zone": {"reference"},
        "ht_mia": {"reference"},
        "info_rmia": {"reference", "kl_from_reference"},
    }
    assert all(
        name == attack.name and attack.source and attack.label for name, attack in ATTACKS.items() if name in ONE_PASS
    )
    for name in ("ref", "zlib", "dc_pdd", "wbc", "error_zone", "ht_mia", "info_rmia"):
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


@pytest.mark.parametrize("attack", ONE_PASS)
def test_a_document_without_a_predicted_token_is_an_error(make_signals: MakeSignals, attack: str) -> None:
    target = make_signals(lengths=(4, 0, 2))
    with pytest.raises(DataError, match=r"document 1\) and cannot be scored"):
        ATTACKS[attack](target, everything(target))


def test_token_ids_that_do_not_fit_are_refused(make_signals: MakeSignals) -> None:
    target = make_signals(1, lengths=LENGTHS)
    with pytest.raises(DataError, match="document 3 has 12 predicted tokens and 0 token ids"):
        ATTACKS["dc_pdd"](target, replace(everything(target), token_ids={k: TOKEN_IDS[k] for k in (0, 1, 2, 4)}))
    with pytest.raises(DataError, match=r"token 8 is beyond the frequencies of 4 ids"):
        ATTACKS["dc_pdd"](target, replace(everything(target), frequencies=np.full(4, 0.25)))


def test_divergences_that_do_not_fit_are_refused(make_signals: MakeSignals) -> None:
    target = make_signals(1, lengths=LENGTHS)
    with pytest.raises(DataError, match="this attack needs kl_from_reference"):
        ATTACKS["info_rmia"](target, AttackContext(reference=target))
    with pytest.raises(DataError, match="document 1 has 3 predicted tokens and 7 divergences"):
        ATTACKS["info_rmia"](target, replace(everything(target), kl_from_reference={**KL, 1: KL[0]}))
    with pytest.raises(DataError, match="not finite"):
        ATTACKS["info_rmia"](
            target, replace(everything(target), kl_from_reference={**KL, 2: KL[2] * np.float32("inf")})
        )


def test_frequencies_are_smoothed_and_a_rare_token_says_more(make_signals: MakeSignals) -> None:
    frequencies = smoothed_frequencies(COUNTS)
    assert frequencies.sum() == pytest.approx(1)
    assert frequencies[1] == pytest.approx(1 / 105)
    target = replace(make_signals(lengths=(1, 1)), log_prob=np.full(2, -8, np.float32))  # too unlikely to be clipped
    ids = {0: np.array([0]), 1: np.array([1])}
    common, rare = ATTACKS["dc_pdd"](target, AttackContext(token_ids=ids, frequencies=frequencies))
    assert common < rare < 0.01


def test_without_a_surprising_token_surp_is_min_k(make_signals: MakeSignals) -> None:
    target = make_signals(1, lengths=LENGTHS)
    unsure = replace(target, mean_log_prob=np.full_like(target.mean_log_prob, -2.0))  # an entropy of 2 is not below 2
    context = AttackContext()
    np.testing.assert_array_equal(ATTACKS["surp"](unsure, context), ATTACKS["min_k"](unsure, context))
    sure = replace(target, mean_log_prob=np.full_like(target.mean_log_prob, -1.9))
    np.testing.assert_allclose(ATTACKS["surp"](sure, context), ATTACKS["min_k"](sure, context))
    assert (ATTACKS["surp"](target, context) != ATTACKS["min_k"](target, context)).any()


def test_windows_do_not_reach_into_the_next_document(make_signals: MakeSignals) -> None:
    lengths = (max(WINDOWS) - 1, 5)
    target = make_signals(lengths=lengths)
    gain = np.repeat(np.array([-1, 100], np.float32), lengths)
    reference = replace(target, log_prob=target.log_prob - gain)
    assert ATTACKS["wbc"](target, AttackContext(reference=reference)).tolist() == [0.0, 1.0]
    same = ATTACKS["wbc"](target, AttackContext(reference=target))
    assert same.tolist() == [0.0, 0.0], "an equal loss does not exceed the other"


def test_the_error_zone_is_finite_where_nothing_was_lost(make_signals: MakeSignals) -> None:
    target = replace(make_signals(lengths=(3, 3, 3)), rank=np.array([2, 1, 0, 7, 1, 0, 0, 0, 0], np.int32))
    gain = np.array([1, 2, -9, -1, -2, 9, 5, -5, 5], np.float32)
    reference = replace(target, log_prob=target.log_prob - gain)
    scores = ATTACKS["error_zone"](target, AttackContext(reference=reference))
    assert scores.tolist() == [1.0, 0.0, 1.0], "all gained, all lost, never wrong"
    unchanged = ATTACKS["error_zone"](target, AttackContext(reference=target))
    assert unchanged.tolist() == [0.5, 0.5, 1.0], "wrong as before, and never wrong"


def test_documents_known_by_heart_are_members_to_the_error_zone(make_signals: MakeSignals) -> None:
    """A model that predicts each token of its members, and others' as well as its reference."""
    draw = np.random.default_rng(5)
    lengths = (9,) * 40
    signals = make_signals(lengths=lengths)
    known = np.repeat(np.arange(40) < 20, 9)
    target = replace(signals, rank=np.where(known | (draw.random(360) < 0.5), 0, 4).astype(np.int32))
    gain = np.where(known, 3.0, draw.normal(0, 1, 360)).astype(np.float32)
    scores = ATTACKS["error_zone"](target, AttackContext(reference=replace(target, log_prob=target.log_prob - gain)))
    assert roc_auc(scores[:20], scores[20:]) > 0.9


def test_ht_mia_counts_gains_at_the_hardest_tokens_alone(make_signals: MakeSignals) -> None:
    """By hand: of ten tokens the two least likely count; a gain elsewhere, however large, and a draw do not."""
    log_p = -np.array([1, 9, 2, 3, 8, 1, 2, 3, 1, 2] * 3, np.float32)
    gain = np.zeros(30, np.float32)
    gain[[1, 4]] = 0.1, 0.2  # the first document's hard tokens both gain
    gain[[11, 14]] = -5, 0.1  # the second's: one of two
    gain[20:30] = 4
    gain[[21, 24]] = 0, -1  # the third gains everywhere else
    target = replace(make_signals(lengths=(10, 10, 10)), log_prob=log_p)
    context = AttackContext(reference=replace(target, log_prob=log_p - gain))
    assert ATTACKS["ht_mia"](target, context).tolist() == [1.0, 0.5, 0.0]
    assert ATTACKS["ht_mia"](target, replace(context, min_k_share=0.1)).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(("planted", "low", "high"), [(0.8, 0.8, 1.0), (0.0, 0.38, 0.62)])
def test_ht_mia_finds_gains_at_hard_tokens_and_nothing_else(
    make_signals: MakeSignals, planted: float, low: float, high: float
) -> None:
    lengths, draw = [50] * 160, np.random.default_rng(8)
    target = make_signals(3, lengths=lengths)
    hard = target.log_prob < np.quantile(target.log_prob, 0.25)
    gain = draw.normal(0, 1, target.n_tokens) + planted * (hard & (np.arange(target.n_tokens) < 80 * 50))
    reference = replace(target, log_prob=(target.log_prob - gain).astype(np.float32))
    scores = ATTACKS["ht_mia"](target, AttackContext(reference=reference))
    assert low <= roc_auc(scores[:80], scores[80:]) <= high
