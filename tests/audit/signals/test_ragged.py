from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtok.audit.signals.ragged import lowest, lowest_mean, segment_sum


def ragged(lengths: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    values = np.random.default_rng(seed).normal(size=sum(lengths)).round(1).astype(np.float32)
    return values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=8), st.integers(0, 99))
def test_segment_sum_equals_a_loop_also_with_empty_segments(lengths: list[int], seed: int) -> None:
    values, offsets = ragged(lengths, seed)
    expected = [values[a:b].astype(np.float64).sum() for a, b in itertools.pairwise(offsets)]
    np.testing.assert_allclose(segment_sum(values, offsets), expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(0, 99), st.sampled_from([0.05, 0.2, 0.7, 1.0]))
def test_lowest_mean_equals_a_loop(lengths: list[int], seed: int, share: float) -> None:
    values, offsets = ragged(lengths, seed)
    expected = []
    for start, end in itertools.pairwise(offsets):
        k = max(1, int(share * (end - start) + 1e-9))
        expected.append(np.sort(values[start:end].astype(np.float64))[:k].mean())
    np.testing.assert_allclose(lowest_mean(values, offsets, share), expected, rtol=1e-12)


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(0, 99), st.sampled_from([0.05, 0.2, 0.7, 1.0]))
def test_lowest_marks_what_lowest_mean_takes_and_its_ties(lengths: list[int], seed: int, share: float) -> None:
    values, offsets = ragged(lengths, seed)
    expected: list[bool] = []
    for start, end in itertools.pairwise(offsets):
        own = values[start:end]
        expected += (own <= sorted(own)[max(1, int(share * len(own) + 1e-9)) - 1]).tolist()
    assert lowest(values, offsets, share).tolist() == expected


def test_lowest_mean_takes_seven_of_ten_at_a_share_of_point_seven() -> None:
    assert 0.29 * 100 < 29  # in floating point: without the rounding guard, 28 values would be taken
    values = np.arange(10, dtype=np.float32)
    assert lowest_mean(values, np.array([0, 10]), 0.7)[0] == 3.0
    assert lowest_mean(values, np.array([0, 10]), 0.29)[0] == 0.5
    assert lowest_mean(np.arange(100, dtype=np.float32), np.array([0, 100]), 0.29)[0] == 14.0
