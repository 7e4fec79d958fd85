"""Checks of the audit itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from dualtok.audit.attacks.adaptive import logistic
from dualtok.audit.attacks.crossfit import WIDENING, cross_fitted_scores
from dualtok.audit.statistics.checks import (
    BlindBaseline,
    Overlap,
    blind_baseline,
    check_audit,
    duplicates,
    near_copies,
    shared_passages,
    strongest_p_value,
    warnings_of,
)

if TYPE_CHECKING:
    from dualtok.audit.report.data import ModelAudit


def documents(seed: int, count: int, ids: range) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.choice(np.array(ids), size=40) for _ in range(count)]


def test_a_bag_of_words_cannot_tell_two_samples_of_one_distribution() -> None:
    baseline = blind_baseline(documents(0, 60, range(200)), documents(1, 60, range(200)), seed=0)
    assert baseline is not None
    assert baseline.low <= 0.5 <= baseline.high
    assert not baseline.is_void


def test_sound_splits_are_hardly_ever_called_void() -> None:
    """Thirty sound audits; at one false alarm in 200, two among them would be a surprise (p = .01)."""
    found = [
        blind_baseline(documents(2 * trial, 40, range(200)), documents(2 * trial + 1, 40, range(200)), seed=trial)
        for trial in range(30)
    ]
    assert sum(baseline is not None and baseline.is_void for baseline in found) < 2
    assert blind_baseline(documents(0, 19, range(200)), documents(1, 60, range(200)), seed=0) is None


def test_a_bag_of_words_sees_a_split_by_subject() -> None:
    baseline = blind_baseline(documents(0, 60, range(150)), documents(1, 60, range(50, 200)), seed=0)
    assert baseline is not None
    assert baseline.is_void
    assert baseline.auc > 0.9


def test_shared_passages_are_found_wherever_they_lie() -> None:
    members = [np.arange(100), np.arange(1000, 1030)]
    others = [
        np.concatenate([np.arange(5000, 5020), np.arange(40, 53)]),  # 13 tokens of a member, at the end
        np.concatenate([np.arange(5000, 5020), np.arange(40, 52)]),  # 12
        np.arange(1010, 1015),  # a short document that a member contains
        np.arange(6000, 6005),
        np.zeros(0, dtype=np.int64),
    ]
    assert shared_passages(members, others, 13) == pytest.approx(2 / 4)
    assert shared_passages(members, others, 12) == pytest.approx(3 / 4)
    assert shared_passages(members, [np.zeros(0, dtype=np.int64)], 13) == 0.0


def test_shared_passages_equal_a_search_of_strings() -> None:
    """Few different ids, so that runs repeat often, and documents shorter than a passage."""
    draw = np.random.default_rng(0)
    members, others = ([draw.integers(0, 3, size) for size in draw.integers(1, 30, 40)] for _ in range(2))
    text = ["".join(map(str, ids)) for ids in members]
    for length in (1, 5, 8):
        expected = [
            any(
                "".join(map(str, ids[i : i + length])) in member
                for member in text
                for i in range(max(1, len(ids) - length + 1))
            )
            for ids in others
        ]
        assert shared_passages(members, others, length) == pytest.approx(np.mean(expected)), length
    assert 0 < np.mean(expected) < 1


def test_duplicates_are_whole_documents() -> None:
    members = [np.array([1, 2, 3]), np.array([4, 5])]
    others = [np.array([4, 5]), np.array([1, 2]), np.array([2, 3, 1]), np.array([6])]
    assert duplicates(members, others) == 0.25
    assert duplicates(members, []) == 0.0


def test_the_p_value_of_the_strongest_attack_counts_all_that_were_tried() -> None:
    """Uniform under the null for one attack, for many, and for many that are the same."""
    for copies, independent in ((1, 1), (1, 12), (12, 1)):
        p_values = []
        for trial in range(100):
            draw = np.random.default_rng([trial, independent, copies])
            scores = {
                f"{i}-{j}": pair
                for i in range(independent)
                for pair in [(draw.normal(size=30), draw.normal(size=30))]
                for j in range(copies)
            }
            p_values.append(strongest_p_value(scores, permutations=99, seed=trial))
        share = np.mean(np.array(p_values) <= 0.1)
        # 100 trials of a share of .1: four standard deviations.
        assert abs(share - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 100), (copies, independent)


def test_the_p_value_holds_for_attacks_that_learned_from_the_labels() -> None:
    """Without the widening a share of .19 of audits of nothing would have p <= .1."""
    p_values = {1.0: [], WIDENING: []}
    trials = 150
    for trial in range(trials):
        x = np.random.default_rng(trial).normal(size=(80, 6))
        scores = {"learned": cross_fitted_scores(logistic(), x, 40, seed=trial), "fixed": (x[:40, 0], x[40:, 0])}
        for factor, found in p_values.items():
            widening = {"learned": factor}
            found.append(strongest_p_value(scores, permutations=99, seed=trial, widening=widening))
    shares = {factor: np.mean(np.array(found) <= 0.1) for factor, found in p_values.items()}
    assert shares[WIDENING] <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / trials)
    assert shares[1.0] > shares[WIDENING]


def test_many_documents_permuted_figures_come_from_their_joint_normal_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against 9,999 drawn permutations, of attacks that agree in part, one of them with ties and one twice."""
    gaps = []
    for trial in range(6):
        draw = np.random.default_rng(trial)
        shared = draw.normal(size=(2, 60))
        shared[0] += 0.04 * trial
        scores = {f"a{i}": tuple(shared + draw.normal(size=(2, 60))) for i in range(4)}
        scores |= {"tied": tuple(shared.round(0)), "twice": scores["a0"]}
        widening = {"a1": WIDENING}
        drawn = strongest_p_value(scores, permutations=9999, seed=trial, widening=widening)
        with monkeypatch.context() as patch:
            patch.setattr("dualtok.audit.statistics.checks.MOST_DRAWN", 0)
            gaps.append(strongest_p_value(scores, permutations=9999, seed=trial, widening=widening) - drawn)
    # Two shares of 9,999 draws differ by .007 in one deviation at most; 120 documents are not yet normal.
    assert np.abs(gaps).max() < 0.03
    assert any(gaps)


def test_a_real_difference_has_the_smallest_p_value_there_is() -> None:
    draw = np.random.default_rng(0)
    scores = {
        "noise": (draw.normal(size=50), draw.normal(size=50)),
        "low": (draw.normal(-2, 1, 50), draw.normal(size=50)),
    }
    assert strongest_p_value(scores, permutations=199, seed=0) == 1 / 200


def test_warnings_name_what_is_wrong(model_rows: list[ModelAudit]) -> None:
    sound = BlindBaseline(0.52, 0.46, 0.58)
    knows, base = model_rows[0], model_rows[2]
    nothing = Overlap(0.0, 0.0, 0.0)
    assert warnings_of(sound, Overlap(0.0, 0.0, 0.02), base) == warnings_of(None, nothing, None) == []
    assert "lists differ by themselves" in warnings_of(BlindBaseline(0.7, 0.64, 0.76), nothing, None)[0]
    assert "12.0% of the non-members share" in warnings_of(sound, Overlap(0.0, 0.0, 0.12), None)[0]
    (line,) = warnings_of(sound, Overlap(0.03, 0.04, 0.0), None)
    assert "3.0% of the non-members are members" in line, "equal ones are near copies too, and told once"
    assert "4.0% of the non-members are nearly" in warnings_of(sound, Overlap(0.0, 0.04, 0.0), None)[0]
    (line,) = warnings_of(sound, nothing, knows)
    assert "finds members in 'plain, last', which saw none" in line
    by_chance = knows.model_copy(update={"strongest_p_value": 0.06})
    assert warnings_of(sound, nothing, by_chance) == []


def test_overlap_voids_from_just_above_one_percent() -> None:
    assert not Overlap(0.01, 0.01, 0.1).is_void
    assert Overlap(0.0, 0.011, 0.0).is_void
    assert Overlap(0.011, 0.0, 0.0).is_void
    assert Overlap(0.0, 0.0, 0.11).is_void


def test_near_copies_are_those_of_a_slow_comparison() -> None:
    draw = np.random.default_rng(0)
    members = [draw.integers(0, 50, size=int(size)) for size in draw.integers(1, 60, size=80)]
    others = [draw.integers(0, 50, size=int(size)) for size in draw.integers(1, 60, size=40)]
    for edits, source in enumerate(members[:40]):  # copies with 0 to 7 changed tokens
        copy = source.copy()
        where = draw.choice(len(copy), size=min(edits % 8, len(copy)), replace=False)
        copy[where] = draw.integers(0, 50, size=len(where))
        others.append(copy)

    def runs(ids: np.ndarray) -> set[tuple[int, ...]]:
        return {tuple(ids[i : i + 5].tolist()) for i in range(len(ids) - 4)}

    sets = [runs(ids) for ids in members]
    asked = [own for ids in others if (own := runs(ids))]
    alike = [any(len(own & other) >= 0.8 * len(own | other) for other in sets if other) for own in asked]
    assert 4 < sum(alike) < len(asked) - 4
    assert near_copies(members, others) == pytest.approx(sum(alike) / len(asked))


def test_boilerplate_makes_no_near_copies() -> None:
    same = np.arange(30)
    assert near_copies([same] * 64, [same]) == 1.0
    assert near_copies([same] * 65, [same]) == 0.0, "what more than 64 members have is passed over"
    assert near_copies([], [same]) == near_copies([same], []) == near_copies([same], [same[:4]]) == 0.0


def test_all_checks_of_an_audit(model_rows: list[ModelAudit]) -> None:
    members, others = documents(0, 30, range(150)), documents(1, 30, range(50, 200))
    found = check_audit(members, [*others, members[0]], passage_tokens=13, null_model=model_rows[0], seed=0)
    assert found.blind_auc is not None
    assert found.blind_auc.low > 0.5
    assert found.duplicates == found.shared_passages == pytest.approx(1 / 31)
    assert found.null_model is not None
    assert (found.null_model.name, found.null_model.p_value) == ("plain, last", model_rows[0].strongest_p_value)
    assert found.warnings[0].startswith("void: a bag of words")
    assert len(found.warnings) == 3
    assert check_audit(members[:5], others, passage_tokens=13, null_model=None, seed=0).blind_auc is None
