"""What a model would give back word for word, from the ranks of true tokens in one forward pass.

Definitions of Liu, Evans and Xiong 2026 (arXiv 2604.18697) as their published code has them, which ranks from 1 where
:class:`~dualtok.audit.signals.signals.Signals` rank from 0. Legend: n documents, k predicted tokens of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import scipy.stats

from dualtok.audit.report.base import Estimate
from dualtok.audit.report.details import LengthCost, Regurgitation, RunLengths, WithinBits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from dualtok.audit.settings import AuditConfig
    from dualtok.audit.signals.signals import Signals

    Floats = NDArray[np.float64]
    Counts = NDArray[np.int64]

Number = TypeVar("Number", np.int64, np.float64)

SHORTER_LENGTHS = (25, 10)
"""Tokens in a row that are looked at beside ``audit.extract_tokens``, where that is more."""
COST_BITS = (0.0, 10.0, 20.0)
"""Budgets of the attacker: 1, about a thousand and about a million queries."""
GROUP_TOKENS = 1 << 20
"""Tokens that are visited at once, so that memory does not grow with the documents."""
ROUNDING = 1e-9


@dataclass(frozen=True)
class Windows:
    """The windows of ``length`` predicted tokens in a row of n documents; none reaches over a cut of a document."""

    length: int
    count: Counts
    """Windows of each document [n]."""
    greedy: Counts
    """Those of them in which every token is the likeliest [n]."""
    bits: Floats
    """Least cost of a window of each document [n], in bits: the sum of log2 (rank + 1); infinite without a window."""


@dataclass(frozen=True)
class ClassPassages:
    """What n documents of one class give back, or some of them."""

    windows: dict[int, Windows]
    """By their length in tokens."""
    runs: Counts
    """Longest run of tokens that are the likeliest [n]."""
    greedy_tokens: int
    tokens: int

    @classmethod
    def joined(cls, parts: Sequence[ClassPassages]) -> ClassPassages:
        """Return several parts' documents as one class."""
        if len(parts) == 1:
            return parts[0]
        windows = {
            length: Windows(
                length,
                *(
                    np.concatenate([getattr(part.windows[length], name) for part in parts])
                    for name in ("count", "greedy", "bits")
                ),
            )
            for length in parts[0].windows
        }
        return cls(
            windows,
            np.concatenate([part.runs for part in parts]),
            sum(part.greedy_tokens for part in parts),
            sum(part.tokens for part in parts),
        )


def class_passages(signals: Signals, config: AuditConfig, block_length: int | None = None) -> ClassPassages:
    """Return what documents of one class give back.

    Args:
        signals: the model's over them.
        config: ``extract_tokens``, the length of a passage.
        block_length: tokens after which documents were cut into pieces; None if they were not.
    """
    lengths = [config.extract_tokens, *(length for length in SHORTER_LENGTHS if length < config.extract_tokens)]
    return ClassPassages(
        windows={length: document_windows(signals, length, block_length) for length in lengths},
        runs=longest_runs(signals, block_length),
        greedy_tokens=int(np.count_nonzero(signals.top1)),
        tokens=signals.n_tokens,
    )


def audit_regurgitation(
    members: ClassPassages, non_members: ClassPassages, config: AuditConfig
) -> Regurgitation | None:
    """State how much of documents a model gives back, members against non-members.

    Args:
        members: of documents that the model was trained on.
        non_members: of others.
        config: ``confidence``.

    Returns:
        The figures, about passages of ``extract_tokens`` tokens, or of fewer if less than half of the documents of a
        class have so many in a row; None if they are too short for any.
    """
    sides = members, non_members
    windows = {length: [side.windows[length] for side in sides] for length in members.windows}
    length = _usual_length(windows)
    if length is None:
        return None
    extracted = [
        exact_share(side.runs[of.count > 0] >= length, config.confidence)
        for side, of in zip(sides, windows[length], strict=True)
    ]
    if extracted[0] is None or extracted[1] is None:
        return None
    return Regurgitation(
        length=length,
        extracted_members=extracted[0],
        extracted_non_members=extracted[1],
        greedy_members=members.greedy_tokens / members.tokens,
        greedy_non_members=non_members.greedy_tokens / non_members.tokens,
        runs_members=run_lengths(members.runs),
        runs_non_members=run_lengths(non_members.runs),
        costs=[_cost(*windows[each], confidence=config.confidence) for each in sorted(windows)],
    )


def document_windows(signals: Signals, length: int, block_length: int | None = None) -> Windows:
    """Return what the windows of ``length`` tokens of each document would cost an attacker.

    A token of which r others are likelier has a probability of at most 1 / (r + 1), at any temperature and under any
    truncation of the distribution that never prefers a less likely token. The product of these over a window is an
    upper bound on the probability that the window is emitted after its true prefix, and its -log2 a lower bound on the
    bits of the cost: 2 to their power is the least expected number of queries (algorithm 2, with all ranks known).

    Args:
        signals: the model's.
        length: l of the definition.
        block_length: as in :func:`class_passages`.
    """
    found: list[tuple[Counts, Counts, Floats]] = [
        (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float64))
    ]
    found += [_group_windows(ranks, offsets, length, block_length) for ranks, offsets in _groups(signals)]
    count, greedy, bits = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Windows(length, count, greedy, bits)


def longest_runs(signals: Signals, block_length: int | None = None) -> Counts:
    """Return the most tokens in a row of each document that are all the likeliest after what is before them [n].

    Greedy decoding gives such a run back word for word after its true prefix. It does not reach over a cut.
    """
    found: list[Counts] = [np.zeros(0, np.int64)]
    for ranks, offsets in _groups(signals):
        position = np.arange(len(ranks))
        ends = np.maximum.accumulate(np.where(ranks > 0, position + 1, _piece_starts(offsets, block_length)))
        found.append(_by_document(np.maximum, position + 1 - ends, offsets, 0))
    return np.concatenate(found)


def verbatim_tokens(written: Counts, truth: Counts) -> int:
    """Return how many tokens from the first on are the same in two sequences of token ids."""
    shorter = min(len(written), len(truth))
    differ = np.flatnonzero(written[:shorter] != truth[:shorter])
    return int(differ[0]) if len(differ) else shorter


def longest_common_run(written: Counts, truth: Counts) -> int:
    """Return the tokens of the longest run that two sequences of token ids share, wherever in each it is."""
    longest, ending = 0, np.zeros(len(truth) + 1, np.int64)
    for token in written:
        ending[1:] = np.where(truth == token, ending[:-1] + 1, 0)
        longest = max(longest, int(ending.max()))
    return longest


def run_lengths(longest: Counts) -> RunLengths:
    """Return the median and the largest of some documents' longest runs."""
    return RunLengths(median=float(np.median(longest)), largest=int(longest.max()))


def exact_share(hits: NDArray[np.bool_], confidence: float) -> Estimate | None:
    """Return a share with its exact interval (Clopper and Pearson 1934); None of nothing."""
    if not len(hits):
        return None
    test = scipy.stats.binomtest(int(hits.sum()), len(hits))
    ends = test.proportion_ci(confidence, method="exact")
    return Estimate(value=float(test.statistic), low=float(ends.low), high=float(ends.high))


def _usual_length(windows: dict[int, list[Windows]]) -> int | None:
    """Return the longest length that half of the documents of each class have, or else the shortest that some have."""
    for length, sides in windows.items():
        if all(np.mean(side.count > 0) >= 0.5 for side in sides):
            return length
    shortest = min(windows)
    return shortest if all((side.count > 0).any() for side in windows[shortest]) else None


def _cost(members: Windows, non_members: Windows, *, confidence: float) -> LengthCost:
    bits, rates, within = [], [], []
    for side in (members, non_members):
        has = side.count > 0
        bits.append(float(side.bits[has].min()) if has.any() else None)
        rates.append(float(side.greedy.sum() / side.count.sum()) if has.any() else None)
        within.append([exact_share(side.bits[has] <= budget + ROUNDING, confidence) for budget in COST_BITS])
    return LengthCost(
        length=members.length,
        n_members=int(np.count_nonzero(members.count)),
        n_non_members=int(np.count_nonzero(non_members.count)),
        bits_members=bits[0],
        bits_non_members=bits[1],
        greedy_windows_members=rates[0],
        greedy_windows_non_members=rates[1],
        within=[
            WithinBits(bits=budget, members=ours, non_members=theirs)
            for budget, ours, theirs in zip(COST_BITS, *within, strict=True)
        ],
    )


def _groups(signals: Signals) -> Iterator[tuple[NDArray[np.int32], Counts]]:
    """Yield ranks and offsets of some documents at a time, about :data:`GROUP_TOKENS` tokens."""
    first, offsets = 0, signals.offsets
    while first < signals.n_documents:
        end = int(np.searchsorted(offsets, offsets[first] + GROUP_TOKENS, side="right")) - 1
        end = max(end, first + 1)
        start, stop = int(offsets[first]), int(offsets[end])
        yield signals.rank[start:stop], offsets[first : end + 1] - start
        first = end


def _piece_starts(offsets: Counts, block_length: int | None) -> Counts:
    """Return of each token [k] the first one of its piece; a piece of b tokens predicts b - 1."""
    document_start: Counts = np.repeat(offsets[:-1], np.diff(offsets))
    if block_length is None:
        return document_start
    inside = np.arange(offsets[-1]) - document_start
    starts: Counts = document_start + inside - inside % (block_length - 1)
    return starts


def _group_windows(
    ranks: NDArray[np.int32], offsets: Counts, length: int, block_length: int | None
) -> tuple[Counts, Counts, Floats]:
    """Return number of windows, of greedy ones, and least bits of each document."""
    k, documents = len(ranks), len(offsets) - 1
    if k < length:
        nothing = np.zeros(documents, np.int64)
        return nothing, nothing, np.full(documents, np.inf)
    starts = _piece_starts(offsets, block_length)
    # A window is within one piece if its first and its last token are.
    whole = starts[: k - length + 1] == starts[length - 1 :]
    costs = _window_sums(np.log2(ranks + np.float64(1)), length)
    greedy = _window_sums((ranks > 0).astype(np.int64), length) == 0
    costs[greedy] = 0.0  # not 1e-13
    padding = np.zeros(length - 1, bool)
    whole = np.concatenate([whole, padding])
    costs = np.where(whole, np.concatenate([costs, np.zeros(length - 1)]), np.inf)
    greedy = whole & np.concatenate([greedy, padding])
    return (
        _by_document(np.add, whole.astype(np.int64), offsets, 0),
        _by_document(np.add, greedy.astype(np.int64), offsets, 0),
        _by_document(np.minimum, costs, offsets, np.inf),
    )


def _window_sums(values: NDArray[Number], length: int) -> NDArray[Number]:
    together = np.concatenate([np.zeros(1, values.dtype), np.cumsum(values, dtype=values.dtype)])
    sums: NDArray[Number] = together[length:] - together[:-length]
    return sums


def _by_document(combine: np.ufunc, values: NDArray[Number], offsets: Counts, empty: float) -> NDArray[Number]:
    """Return the values of each document's tokens combined [n]; ``empty`` for a document without any."""
    out = np.full(len(offsets) - 1, empty, dtype=values.dtype)
    filled = np.diff(offsets) > 0
    if filled.any():
        out[filled] = combine.reduceat(values, offsets[:-1][filled])
    return out
