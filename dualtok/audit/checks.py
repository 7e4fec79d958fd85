"""Checks of the audit itself: what must not be found, and how sure the strongest finding is.

Legend: n members, m non-members, f attacks, r permutations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.stats

from dualtok.audit.adaptive import FOLDS
from dualtok.audit.metrics import bootstrap_interval, roc_auc

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from dualtok.audit.report_data import ModelAudit

PASSAGE_CHARACTERS = 200
"""Length of a passage that two documents do not share by chance: the 50 tokens of Lee et al. 2022 (arXiv 2107.06499) at
about 4 characters each."""
BLIND_CONFIDENCE = 0.99
"""Of the blind baseline's interval: one sound audit in 200 is called void."""
MOST_SHARED = 0.1
"""Share of such non-members above which the audit warns."""
BLOCK = 256
"""Permutations at a time."""


@dataclass(frozen=True)
class BlindBaseline:
    """How well a bag of words, which never saw a model, tells members from non-members; its interval is of 99 %."""

    auc: float
    low: float
    high: float

    @property
    def is_void(self) -> bool:
        """Whether the two classes differ by themselves, so that no attack's figure means anything."""
        return self.low > 0.5


def blind_baseline(
    members: Sequence[NDArray[np.int64]], non_members: Sequence[NDArray[np.int64]], *, seed: int
) -> BlindBaseline:
    """Judge documents by their token ids alone: tf-idf and logistic regression, trained on the other documents.

    Args:
        members: token ids of each member.
        non_members: token ids of each non-member.
        seed: of the halves and of the bootstrap.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline

    texts = np.array([" ".join(map(str, ids)) for ids in (*members, *non_members)], dtype=object)
    is_member = np.arange(len(texts)) < len(members)
    scores = np.empty(len(texts))
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(texts, is_member):
        words = TfidfVectorizer(token_pattern=r"\d+", sublinear_tf=True, min_df=2)
        model = make_pipeline(words, LogisticRegression(max_iter=1000)).fit(texts[train], is_member[train])
        scores[test] = scipy.stats.rankdata(model.predict_proba(texts[test])[:, 1]) / (len(test) + 1)
    inside, outside = scores[: len(members)], scores[len(members) :]
    low, high = bootstrap_interval(inside, outside, confidence=BLIND_CONFIDENCE, seed=seed)
    return BlindBaseline(roc_auc(inside, outside), low, high)


def warnings_of(blind: BlindBaseline, shared: float, null_model: ModelAudit | None) -> list[str]:
    """Return what makes an audit's figures doubtful.

    Args:
        blind: the bag of words' success.
        shared: of :func:`shared_passages`.
        null_model: the audit of a model that saw no member, if there is one.
    """
    found = []
    if blind.is_void:
        found.append(
            f"a bag of words tells members from non-members without any model (AUC {blind.auc:.3f}, from "
            f"{blind.low:.3f}): the two differ by themselves, and no attack's figure means anything; split at random"
        )
    if shared > MOST_SHARED:
        found.append(
            f"{shared:.1%} of the non-members share a passage of {PASSAGE_CHARACTERS} characters with a member: remove "
            "near duplicates (data.near_duplicate_threshold)"
        )
    if null_model is not None and null_model.strongest.auc_two_sided.low > 0.5:
        found.append(
            f"{null_model.strongest.label} finds members in {null_model.name!r}, which saw none (two-sided AUC "
            f"{null_model.strongest.auc_two_sided.value:.3f}): members and non-members differ by themselves"
        )
    return found


def shared_passages(
    members: Sequence[NDArray[np.int64]], non_members: Sequence[NDArray[np.int64]], tokens: int
) -> float:
    """Return the share of non-members that have a run of so many token ids which some member has too.

    A document shorter than that counts when a member contains all of it.
    """
    lengths = {min(tokens, len(ids)) for ids in non_members if len(ids)}
    known = {length: {gram for ids in members for gram in _grams(ids, length)} for length in lengths}
    shared = [
        any(gram in known[min(tokens, len(ids))] for gram in _grams(ids, min(tokens, len(ids))))
        for ids in non_members
        if len(ids)
    ]
    return float(np.mean(shared)) if shared else 0.0


def _grams(ids: NDArray[np.int64], length: int) -> set[bytes]:
    raw = np.ascontiguousarray(ids, dtype=np.int64)
    return {raw[i : i + length].tobytes() for i in range(len(raw) - length + 1)}


def strongest_p_value(
    scores: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], *, permutations: int, seed: int
) -> float:
    """Return the p-value of the strongest attack, however many were tried.

    The statistic is the largest |AUC - 1/2| of all attacks. Its null distribution comes from giving the membership
    labels to the documents anew, the same labels in every attack, so that attacks that agree are not counted twice
    (Westfall and Young 1993).

    Args:
        scores: attack -> scores of members [n] and of non-members [m], the same documents in each.
        permutations: r; the smallest p-value is 1 / (r + 1).
        seed: of the permutations.
    """
    pairs = list(scores.values())
    n = len(pairs[0][0])
    ranks = np.stack([scipy.stats.rankdata(np.concatenate(pair)) for pair in pairs])  # [f, n + m]
    total = ranks.shape[1]
    lowest, pairings = n * (n + 1) / 2, n * (total - n)

    def strongest(labels: NDArray[np.float64]) -> NDArray[np.float64]:
        auc = (labels @ ranks.T - lowest) / pairings
        return np.asarray(np.abs(auc - 0.5).max(axis=1))

    truth = (np.arange(total) < n).astype(np.float64)[None, :]
    observed = strongest(truth)[0]
    draw = np.random.default_rng(seed)
    as_strong = 0
    for start in range(0, permutations, BLOCK):
        labels = draw.permuted(np.repeat(truth, min(BLOCK, permutations - start), axis=0), axis=1)
        as_strong += int(np.count_nonzero(strongest(labels) >= observed - 1e-12))
    return (as_strong + 1) / (permutations + 1)
