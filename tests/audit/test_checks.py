"""Checks of the audit itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from dualtok.audit.checks import BlindBaseline, blind_baseline, shared_passages, strongest_p_value, warnings_of

if TYPE_CHECKING:
    from dualtok.audit.report_data import ModelAudit


def documents(seed: int, count: int, ids: range) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.choice(np.array(ids), size=40) for _ in range(count)]


def test_a_bag_of_words_cannot_tell_two_samples_of_one_distribution() -> None:
    baseline = blind_baseline(documents(0, 60, range(200)), documents(1, 60, range(200)), seed=0)
    assert baseline.low <= 0.5 <= baseline.high
    assert not baseline.is_void


def test_a_bag_of_words_sees_a_split_by_subject() -> None:
    baseline = blind_baseline(documents(0, 60, range(150)), documents(1, 60, range(50, 200)), seed=0)
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


def test_the_p_value_of_the_strongest_attack_counts_all_that_were_tried() -> None:
    """Uniform under the null for one attack, for many, and for many that are the same."""
    for copies, independent in ((1, 1), (1, 12), (12, 1)):
        p_values = []
        for trial in range(100):
            draw = np.random.default_rng([trial, independent, copies])
            scores = {f"{i}-{j}": pair for i in range(independent)
                      for pair in [(draw.normal(size=30), draw.normal(size=30))] for j in range(copies)}  # fmt: skip
            p_values.append(strongest_p_value(scores, permutations=99, seed=trial))
        share = np.mean(np.array(p_values) <= 0.1)
        # 100 trials of a share of .1: four standard deviations.
        assert abs(share - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 100), (copies, independent)


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
    assert warnings_of(sound, 0.02, base) == []
    assert "bag of words" in warnings_of(BlindBaseline(0.7, 0.64, 0.76), 0.0, None)[0]
    assert "12.0% of the non-members" in warnings_of(sound, 0.12, None)[0]
    (line,) = warnings_of(sound, 0.0, knows)
    assert "finds members in 'plain, last', which saw none" in line
