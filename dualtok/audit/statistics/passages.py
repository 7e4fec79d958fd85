"""Passages that documents share: runs of token ids that two of them have in common, found by rolling hashes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    TokenIds = NDArray[np.int64]

PASSAGE_CHARACTERS = 200
"""Length of a passage that two documents do not share by chance: the 50 tokens of Lee et al. 2022 (arXiv 2107.06499) at
about 4 characters each."""
MOST_SHARED = 0.1
"""Share of non-members with such a passage above which an audit is doubtful."""
NEAR, NEAR_TOKENS = 0.8, 5
"""Similarity from which two documents count as near copies, and tokens of the runs that are compared; the former is the
default of ``data.near_duplicate_threshold``."""
MOST_MEMBERS = 64
COMPARED_AT_ONCE = 4096
"""Non-members that are compared at a time."""
BASE, MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
"""Two odd 64-bit numbers of splitmix64 (Steele et al. 2014)."""


def shared_passages(members: Sequence[TokenIds], non_members: Sequence[TokenIds], tokens: int) -> float:
    """Return the share of non-members that have a run of so many token ids which some member has too.

    A document shorter than that counts when a member contains all of it; an empty one is left out.

    Args:
        members: token ids of each member.
        non_members: token ids of each non-member.
        tokens: length of a run, in tokens.
    """
    asked = Passages(non_members, tokens)
    asked.find_in(members)
    return asked.share


def near_copies(members: Sequence[TokenIds], non_members: Sequence[TokenIds]) -> float:
    """Return the share of non-members whose set of 5-token runs is at least .8 alike (Jaccard) to that of a member.

    Exact, but that runs which more than 64 members have are passed over: boilerplate makes no copy. Documents of fewer
    than 5 tokens are left out.

    Args:
        members: token ids of each member.
        non_members: token ids of each non-member.
    """
    if not members or not non_members:
        return 0.0
    known_hash, known_document = _distinct(members)
    order = np.argsort(known_hash, kind="stable")
    known_hash, known_document = known_hash[order], known_document[order]
    first, end = (np.searchsorted(known_hash, known_hash, side=side) for side in ("left", "right"))
    rare = end - first <= MOST_MEMBERS
    known_hash, known_document = known_hash[rare], known_document[rare]
    known_size = np.bincount(known_document, minlength=len(members))
    copies = counted = 0
    for start in range(0, len(non_members), COMPARED_AT_ONCE):
        asked_hash, asked_document = _distinct(non_members[start : start + COMPARED_AT_ONCE])
        first, end = (np.searchsorted(known_hash, asked_hash, side=side) for side in ("left", "right"))
        times = end - first
        position = np.repeat(first - np.concatenate([[0], np.cumsum(times)[:-1]]), times) + np.arange(times.sum())
        pairs = np.repeat(asked_document, times) * len(members) + known_document[position]
        pair, common = np.unique(pairs, return_counts=True)
        size = np.bincount(asked_document, minlength=1)
        asked, known = np.divmod(pair, len(members))
        alike = common >= NEAR * (size[asked] + known_size[known] - common)
        copies += len(np.unique(asked[alike]))
        counted += int(np.count_nonzero(size))
    return copies / max(1, counted)


def _distinct(documents: Sequence[TokenIds]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return each document's distinct 5-token runs: their hashes, and the document's place in the list."""
    hashes, document = _Runs(documents).of(NEAR_TOKENS)
    order = np.lexsort((hashes, document))
    hashes, document = hashes[order], document[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (document[1:] != document[:-1])
    return hashes[new], document[new]


class Passages:
    """The runs of token ids of some documents, to be looked for in others, a part of them at a time.

    Args:
        documents: token ids of each.
        tokens: length of a run. A document shorter than that counts when all of it is found; an empty one never does.
    """

    def __init__(self, documents: Sequence[TokenIds], tokens: int) -> None:
        lengths = np.array([min(tokens, len(ids)) for ids in documents], dtype=np.int64)
        self.found = np.zeros(len(lengths), dtype=bool)
        """Documents that share a run with one of the others."""
        self._counted = lengths > 0
        runs = _Runs(documents)
        self._asked: dict[int, tuple[NDArray[np.uint64], NDArray[np.int64]]] = {}
        for length in np.unique(lengths[lengths > 0]).tolist():
            hashes, document = runs.of(length)
            here = lengths[document] == length
            order = np.argsort(hashes[here], kind="stable")
            self._asked[length] = hashes[here][order], document[here][order]

    def find_in(self, documents: Sequence[TokenIds]) -> None:
        """Note which of the asked documents share a run with one of these."""
        others = _Runs(documents)
        for length, (hashes, document) in self._asked.items():
            known = np.unique(others.of(length)[0])
            positions = np.searchsorted(hashes, known)
            known = known[(positions < len(hashes)) & (hashes[np.minimum(positions, len(hashes) - 1)] == known)]
            self.found[document[np.isin(hashes, known)]] = True

    @property
    def share(self) -> float:
        """The share of them that do."""
        return float(self.found[self._counted].mean()) if self._counted.any() else 0.0


class _Runs:
    """64-bit hashes of all runs of token ids inside documents, each length in one pass.

    A run from place i is hashed to the sum of mix(id) * BASE^j over its tokens, divided by BASE^i, modulo 2^64 (numpy's
    integers wrap around). Two of 10^7 runs are taken for equal by mistake with a chance of about 10^-5.
    """

    def __init__(self, documents: Sequence[TokenIds]) -> None:
        sizes = [len(ids) for ids in documents]
        self.document = np.repeat(np.arange(len(sizes)), sizes)
        ids = np.concatenate([*documents, np.zeros(0, np.int64)]).astype(np.uint64) + np.uint64(1)
        mixed = (ids ^ (ids << np.uint64(31))) * np.uint64(MIX)
        mixed ^= mixed >> np.uint64(29)
        powers = np.cumprod(np.full(len(ids), BASE, np.uint64))
        self.sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed * powers, dtype=np.uint64)])
        self.inverse = np.cumprod(np.full(len(ids), pow(BASE, -1, 2**64), np.uint64))

    def of(self, length: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return the hash of every run of ``length`` ids inside a document, and that document's place in the list."""
        count = max(len(self.document) - length + 1, 0)
        first, last = self.document[:count], self.document[length - 1 :]
        hashes = (self.sums[length : length + count] - self.sums[:count]) * self.inverse[:count]
        return hashes[first == last], first[first == last]
