from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dualtok.audit.attacks.base import AttackContext
from dualtok.audit.attacks.registry import ATTACKS, attack_scores, names_of
from dualtok.audit.settings import AuditConfig
from dualtok.audit.signals.signals import Signals
from dualtok.audit.statistics.evaluate import CALIBRATED_EDGES, audit_model, choose_documents
from dualtok.audit.statistics.metrics import bootstrap_interval, roc_auc, roc_curve, tpr_of_counts, two_sided_interval
from dualtok.errors import DataError

if TYPE_CHECKING:
    from dualtok.audit.report.data import ModelAudit

KNOWING = names_of("knows_defence")
ONE_PASS = [name for name in names_of("single_pass", "joint") if ATTACKS[name].of_document is not None]
"""Those whose scores can be computed again one class at a time."""

MakeSignals = Callable[..., Signals]
LENGTHS = (9, 14, 30, 22, 11) * 6
CONFIG = AuditConfig(bootstrap_resamples=150, fpr_targets=[0.5, 0.1, 0.01], min_k_share=0.3, seed=3)


def contexts(make_signals: MakeSignals) -> dict[str, AttackContext]:
    sizes = {document: 40 + document % 13 for document in range(600)}
    rng = np.random.default_rng(5)
    ids = {first + place: rng.integers(0, 30, n) for first in (0, 500) for place, n in enumerate(LENGTHS)}
    known: dict[str, Any] = {"zlib_bytes": sizes, "token_ids": ids, "frequencies": np.full(30, 1 / 30)}
    return {
        "member_context": AttackContext(reference=make_signals(3, lengths=LENGTHS), **known),
        "non_member_context": AttackContext(reference=make_signals(4, lengths=LENGTHS, first_id=500), **known),
    }


def classes(make_signals: MakeSignals) -> tuple[Signals, Signals]:
    return make_signals(1, lengths=LENGTHS, loss=2.5), make_signals(2, lengths=LENGTHS, first_id=500)


def test_a_row_states_what_the_parts_compute(make_signals: MakeSignals) -> None:
    members, others = classes(make_signals)
    both = contexts(make_signals)
    row = audit_model("plain", members, others, config=CONFIG, step=7, **both)
    assert (row.name, row.step, row.n_members, row.n_non_members) == ("plain", 7, 30, 30)
    assert (row.perplexity_members, row.perplexity_non_members) == (members.perplexity, others.perplexity)
    assert row.loss_gap == pytest.approx(np.log(others.perplexity) - np.log(members.perplexity), rel=1e-9)
    assert row.loss_gap > 0
    assert [attack.name for attack in row.attacks] == list(CONFIG.attacks)
    assert row.not_run == {}
    for result in (result for result in row.attacks if result.name in ONE_PASS):
        scores = tuple(
            ATTACKS[result.name](signals, replace(context, min_k_share=0.3))
            for signals, context in zip((members, others), both.values(), strict=True)
        )
        interval = bootstrap_interval(*scores, resamples=150, seed=3)
        assert result.auc.value == roc_auc(*scores)
        assert (result.auc.low, result.auc.high) == interval
        assert (result.auc_two_sided.low, result.auc_two_sided.high) == two_sided_interval(*interval)
        assert result.auc_two_sided.value == max(result.auc.value, 1 - result.auc.value)
        half, tenth, none = result.tpr
        curve = roc_curve(*scores)
        assert half.tpr is not None
        assert (half.tpr.value, half.attained_fpr) == curve.tpr_within(0.5)
        expected = bootstrap_interval(*scores, tpr_of_counts(0.5), resamples=150, seed=3)
        assert (half.tpr.low, half.tpr.high) == expected
        assert (half.note, tenth.note[:6]) == ("", "coarse")
        assert (none.tpr, none.attained_fpr) == (None, None)
        assert none.note == "n/a: 30 non-members, fewer than 1/0.01"
        assert set(zip(result.roc.fpr, result.roc.tpr, strict=True)) <= set(zip(curve.fpr, curve.tpr, strict=True))


def test_the_strongest_attack_is_corrected_for_the_number_of_attacks(make_signals: MakeSignals) -> None:
    members, others = classes(make_signals)
    row = audit_model("plain", members, others, config=CONFIG, **contexts(make_signals))
    best = max(row.attacks, key=lambda attack: attack.auc_two_sided.value)
    strongest = row.strongest.auc_two_sided
    assert (row.strongest.label, strongest.value) == (best.label, best.auc_two_sided.value)
    pair = tuple(replace(context, min_k_share=0.3) for context in contexts(make_signals).values())
    scores = attack_scores((members, others), (pair[0], pair[1]), CONFIG.attacks, CONFIG.seed).scores
    corrected = 1 - 0.05 / len(scores)
    ends = [
        two_sided_interval(
            *bootstrap_interval(*values, resamples=150, seed=3, confidence=corrected, widening=ATTACKS[attack].widening)
        )
        for attack, values in scores.items()
    ]
    assert len(scores) == len(CONFIG.attacks)
    assert (strongest.low, strongest.high) == (max(low for low, _ in ends), max(high for _, high in ends))
    assert [best.target_fpr for best in row.strongest_tpr] == [0.5, 0.1]
    for found, position in zip(row.strongest_tpr, (0, 1), strict=True):
        rates = {attack.label: attack.tpr[position].tpr for attack in row.attacks}
        assert found.tpr.value == max(rate.value for rate in rates.values() if rate is not None)
        assert found.tpr.value == rates[found.label].value
        ends = [
            bootstrap_interval(
                *values,
                tpr_of_counts(found.target_fpr),
                resamples=150,
                seed=3,
                confidence=corrected,
                widening=ATTACKS[attack].widening,
            )
            for attack, values in scores.items()
        ]
        assert (found.tpr.low, found.tpr.high) == (max(low for low, _ in ends), max(high for _, high in ends))
    alone = audit_model(
        "plain", members, others, config=replace(CONFIG, attacks=(best.name,)), **contexts(make_signals)
    )
    assert alone.strongest.auc_two_sided == best.auc_two_sided


def test_a_reversed_signal_is_found_two_sided(make_signals: MakeSignals) -> None:
    members, others = make_signals(1, lengths=LENGTHS, loss=4.5), make_signals(2, lengths=LENGTHS, first_id=500)
    row = audit_model("over-unlearned", members, others, config=replace(CONFIG, attacks=("loss",)))
    result = row.attack("loss")
    assert result is not None
    assert result.auc.high < 0.3
    assert result.auc_two_sided.low > 0.7
    assert row.loss_gap < 0


def test_attacks_without_what_they_need_are_named(make_signals: MakeSignals) -> None:
    members, others = classes(make_signals)
    row = audit_model("base", members, others, config=CONFIG)
    assert [attack.name for attack in row.attacks] == ["loss", "min_k", "min_k_plus_plus", "surp"]
    comparing = ["Ref", "WBC", "EZ", "HT-MIA", "RMIA", *(ATTACKS[name].label for name in KNOWING)]
    without = dict.fromkeys(comparing, "needs reference")
    assert row.not_run == {**without, "Zlib": "needs zlib", "DC-PDD": "needs frequencies"}
    assert row.calibrated is None
    assert row.attack("ref") is None
    one_sided = contexts(make_signals) | {"non_member_context": AttackContext()}
    assert audit_model("base", members, others, config=CONFIG, **one_sided).not_run == row.not_run
    with pytest.raises(DataError, match=r"none of the attacks \['ref'\] can run"):
        audit_model("base", members, others, config=replace(CONFIG, attacks=("ref",)))


def test_documents_without_a_token_are_left_out_and_counted(make_signals: MakeSignals) -> None:
    members = make_signals(1, lengths=(0, 5, 6, 0, 9))
    others = make_signals(2, lengths=(0, 5, 6, 9), first_id=500)
    row = audit_model("m", members, others, config=CONFIG)
    assert (row.n_members, row.members_left_out, row.n_non_members, row.non_members_left_out) == (3, 2, 3, 1)
    assert row.attacks == audit_model("m", members.with_tokens(), others.with_tokens(), config=CONFIG).attacks
    with pytest.raises(DataError, match="no non-members with at least two tokens"):
        audit_model("m", members, make_signals(lengths=(0,)), config=CONFIG)


def test_the_histogram_of_s_counts_every_token_with_the_sign_of_the_paper(make_signals: MakeSignals) -> None:
    members, others = classes(make_signals)
    both = contexts(make_signals)
    row = audit_model("plain", members, others, config=CONFIG, **both)
    histogram = row.calibrated
    assert histogram is not None
    assert sum(histogram.members) == members.n_tokens
    assert sum(histogram.non_members) == others.n_tokens
    reference = both["member_context"].reference
    assert reference is not None
    s = -members.log_prob.astype(np.float64) + reference.log_prob  # CE(theta) - CE(theta_ref)
    assert histogram.mean_members == pytest.approx(s.mean())
    assert histogram.mean_members < 0  # better predicted than by the reference
    below = int(np.searchsorted(CALIBRATED_EDGES, 0))
    assert CALIBRATED_EDGES[below] == 0
    assert sum(histogram.members[:below]) == np.count_nonzero(s < 0)
    far = replace(members, log_prob=members.log_prob - np.float32(100))
    outer = audit_model("far", far, others, config=CONFIG, **both).calibrated
    assert outer is not None
    assert outer.members[-1] == members.n_tokens


def test_the_same_model_and_seed_give_the_same_row(make_signals: MakeSignals) -> None:
    members, others = classes(make_signals)

    def row(seed: int) -> ModelAudit:
        return audit_model("m", members, others, config=replace(CONFIG, seed=seed), **contexts(make_signals))

    assert row(1) == row(1)
    assert row(1).attacks[0].auc != row(2).attacks[0].auc


def test_choose_documents_is_a_sample_of_the_set() -> None:
    ids = [9, 3, 3, 7, 1, 5]
    assert choose_documents(ids, None, 0).tolist() == [1, 3, 5, 7, 9]
    assert choose_documents(ids, 5, 0).tolist() == [1, 3, 5, 7, 9]
    chosen = choose_documents(ids, 3, 0)
    assert len(set(chosen.tolist()) & {1, 3, 5, 7, 9}) == 3
    assert (np.diff(chosen) > 0).all()
    assert chosen.tolist() == choose_documents(ids[::-1], 3, 0).tolist()
    many = [choose_documents(range(50), 10, seed).tolist() for seed in range(40)]
    assert len({tuple(sample) for sample in many}) == 40
    assert {document for sample in many for document in sample} == set(range(50))
