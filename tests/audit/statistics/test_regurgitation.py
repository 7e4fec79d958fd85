"""Regurgitation from ranks against plain loops over windows, and against cases that are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from dualtok.audit.settings import AuditConfig
from dualtok.audit.signals.signals import Signals
from dualtok.audit.statistics import regurgitation
from dualtok.audit.statistics.regurgitation import (
    ClassPassages,
    audit_regurgitation,
    class_passages,
    document_windows,
    exact_share,
    longest_runs,
)

Document = list[int]
"""Ranks of a document's predicted tokens."""


def signals(documents: list[Document], first_id: int = 0) -> Signals:
    k = sum(map(len, documents))
    return Signals(
        document=first_id + np.arange(len(documents), dtype=np.int64),
        offsets=np.cumsum([0, *map(len, documents)]).astype(np.int64),
        log_prob=np.full(k, -1, np.float32),
        rank=np.array([rank for document in documents for rank in document], np.int32),
        mean_log_prob=np.full(k, -1, np.float32),
        var_log_prob=np.ones(k, np.float32),
    )


def drawn(seed: int, count: int = 25) -> list[Document]:
    rng = np.random.default_rng(seed)
    lengths = [0, 1, *rng.integers(2, 40, count).tolist(), 0]
    return [(rng.integers(0, 9, n) * (rng.random(n) < 0.4)).tolist() for n in lengths]


def pieces(document: Document, block: int | None) -> list[Document]:
    """A document cut into blocks of ``block`` tokens has pieces that predict one less each."""
    if block is None:
        return [document]
    return [document[start : start + block - 1] for start in range(0, len(document), block - 1)]


def naive_windows(document: Document, length: int, block: int | None) -> list[Document]:
    return [
        piece[start : start + length] for piece in pieces(document, block) for start in range(len(piece) - length + 1)
    ]


def naive_longest(document: Document, block: int | None) -> int:
    longest = 0
    for piece in pieces(document, block):
        run = 0
        for rank in piece:
            run = run + 1 if rank == 0 else 0
            longest = max(longest, run)
    return longest


def both(members: Signals, non_members: Signals, config: AuditConfig, block_length: int | None = None) -> Any:
    """Return the figures; they must not change when the members come in two parts."""
    half = members.n_documents // 2
    parts = [members.take(np.arange(half)), members.take(np.arange(half, members.n_documents))] if half else [members]
    others = class_passages(non_members, config, block_length)
    whole = audit_regurgitation(class_passages(members, config, block_length), others, config)
    joined = ClassPassages.joined([class_passages(part, config, block_length) for part in parts])
    assert audit_regurgitation(joined, others, config) == whole
    return whole


@pytest.mark.parametrize("block", [None, 4, 9, 64])
@pytest.mark.parametrize("group", [1, 30, 1 << 20])
def test_windows_and_runs_are_those_of_plain_loops(
    block: int | None, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regurgitation, "GROUP_TOKENS", group)
    documents = drawn(3)
    target = signals(documents)
    assert longest_runs(target, block).tolist() == [naive_longest(document, block) for document in documents]
    for length in (1, 2, 5, 12, 100):
        found = document_windows(target, length, block)
        for place, document in enumerate(documents):
            windows = naive_windows(document, length, block)
            costs = [math.log2(math.prod(rank + 1 for rank in window)) for window in windows]
            assert found.count[place] == len(windows)
            assert found.greedy[place] == sum(not any(window) for window in windows)
            assert found.bits[place] == pytest.approx(min(costs, default=math.inf), abs=1e-9)


def test_the_figures_of_a_model_are_counted_by_hand() -> None:
    # Of 12 tokens, but the first; 10 in a row count. The fourth document is too short to have a passage.
    members = [[0] * 13, [0] * 10 + [1, 7], [3] + [0] * 9 + [1, 5], [0] * 9, [7] * 12]
    others = [[1] * 12, [0] * 4 + [1] * 8]
    found = both(signals(members), signals(others, 9), AuditConfig(extract_tokens=10))
    assert found is not None
    assert found.length == 10
    assert found.extracted_members.value == 2 / 4
    assert found.extracted_non_members.value == 0
    assert found.greedy_members == (13 + 10 + 9 + 9) / 58
    assert found.greedy_non_members == 4 / 24
    assert found.runs_members is not None
    assert found.runs_non_members is not None
    assert (found.runs_members.median, found.runs_members.largest) == (9, 13)
    assert (found.runs_non_members.median, found.runs_non_members.largest) == (2, 4)
    (cost,) = found.costs
    assert (cost.length, cost.n_members, cost.n_non_members) == (10, 4, 2)
    assert (cost.bits_members, cost.bits_non_members) == (0, 6)
    assert cost.greedy_windows_members == (4 + 1) / (4 + 3 * 3)
    assert cost.greedy_windows_non_members == 0
    # Cheapest passages: 0, 0, log2(2) = 1 and 10 log2(8) = 30 bits; others 10 and 6 bits.
    shares = {within.bits: (within.members, within.non_members) for within in cost.within}
    assert list(shares) == [0, 10, 20]
    assert [ours.value for ours, _ in shares.values() if ours is not None] == [2 / 4, 3 / 4, 3 / 4]
    assert [theirs.value for _, theirs in shares.values() if theirs is not None] == [0, 1, 1]


def test_passages_do_not_reach_over_a_cut() -> None:
    """Two pieces of 8 tokens, all greedy: 7 predicted tokens each, with one between that was given."""
    whole = signals([[0] * 14])
    assert longest_runs(whole, 8).tolist() == [7]
    assert longest_runs(whole, None).tolist() == [14]
    config = AuditConfig(extract_tokens=10)
    assert both(whole, whole, config, 8) is None
    assert both(whole, whole, config, 16) is not None


@pytest.mark.parametrize(
    ("lengths", "others", "expected"),
    [
        ((60, 60, 10), (50, 9), 50),
        ((60, 20, 30), (50, 26), 25),
        ((60, 60), (49, 26), 25),
        ((12, 9, 9), (10, 3, 3), 10),
        ((12, 9, 9), (9, 3, 3), None),
    ],
)
def test_shorter_passages_count_where_most_documents_are_short(
    lengths: tuple[int, ...], others: tuple[int, ...], expected: int | None
) -> None:
    members, non_members = (signals([[1] * n for n in own]) for own in (lengths, others))
    found = both(members, non_members, AuditConfig())
    assert (found.length if found is not None else None) == expected


def test_the_cost_bounds_the_probability_of_every_decoding_that_keeps_the_order() -> None:
    """Temperatures, top-k and top-p of random distributions: none gives a window more than 2 to the -bits."""
    rng = np.random.default_rng(8)
    logits, true = rng.normal(0, 2, (6, 30)), rng.integers(0, 30, 6)
    true[0] = logits[0].argmax()
    ranks = [int(sum(other > row[token] for other in row)) for row, token in zip(logits, true, strict=True)]
    (bits,) = document_windows(signals([ranks]), 6).bits
    for temperature in (0.05, 0.3, 1.0, 4.0, 1e6):
        for top in (1, 3, 10, 30):
            p = 1.0
            for row, token in zip(logits, true, strict=True):
                kept = np.where(row >= np.sort(row)[-top], row, -np.inf) / temperature
                weights = np.exp(kept - kept.max())
                p *= weights[token] / weights.sum()
            assert p <= 2.0**-bits * (1 + 1e-9)


def test_intervals_are_exact() -> None:
    hits = np.arange(20) < 3
    found = exact_share(hits, 0.9)
    assert found is not None
    assert found.value == 3 / 20
    assert scipy.stats.binom.sf(2, 20, found.low) == pytest.approx(0.05)  # P(at least 3)
    assert scipy.stats.binom.cdf(3, 20, found.high) == pytest.approx(0.05)
    assert exact_share(np.zeros(0, bool), 0.9) is None


def test_ranks_beyond_the_first_change_the_cost_alone() -> None:
    documents = drawn(5)
    target = signals(documents)
    doubled = replace(target, rank=target.rank * 2)
    assert longest_runs(target).tolist() == longest_runs(doubled).tolist()
    assert (document_windows(doubled, 5).bits >= document_windows(target, 5).bits).all()
    assert (document_windows(doubled, 5).bits > document_windows(target, 5).bits).any()
