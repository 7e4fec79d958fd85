"""Checks of the audit itself: what must not be found, and how sure the strongest finding is.

Legend: n members, m non-members, f attacks, r permutations.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.sparse
import scipy.stats

from dualtok.audit.attacks.crossfit import FEWEST, WIDENING, cross_fitted_scores
from dualtok.audit.report.base import Estimate
from dualtok.audit.report.data import Checks, NullModel
from dualtok.audit.statistics.metrics import bootstrap_interval, roc_auc
from dualtok.audit.statistics.passages import MOST_SHARED, PASSAGE_CHARACTERS, near_copies, shared_passages
from dualtok.audit.statistics.resampling import MOST_DRAWN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from dualtok.audit.report.data import ModelAudit

    Floats = NDArray[np.float64]
    TokenIds = NDArray[np.int64]

# Imported where they are used, for what they take to load: scikit-learn (1 s).

BLIND_CONFIDENCE = 0.99
"""Of the blind baseline's interval: one sound audit in 200 is called void."""
MOST_DUPLICATES = 0.01
"""Share of non-members equal to a member above which the audit warns."""
SURPRISING = 0.05
"""p-value up to which the strongest attack on a model that saw no member has found something."""
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


class Overlap(NamedTuple):
    """What non-members have in common with members, as shares of the non-members."""

    exact: float
    """Equal to a member, token by token."""
    near: float
    """Near copies of a member, equal ones included."""
    passages: float
    """With a passage of about 200 characters that a member has too."""

    @property
    def is_void(self) -> bool:
        """Whether so many non-members are (partly) members that an audit that finds nothing says nothing."""
        return max(self.exact, self.near) > MOST_DUPLICATES or self.passages > MOST_SHARED


def check_audit(
    members: Sequence[TokenIds],
    non_members: Sequence[TokenIds],
    *,
    passage_tokens: int,
    null_model: ModelAudit | None,
    seed: int,
) -> Checks:
    """Look for differences between members and non-members that the audited model has not made.

    Args:
        members: token ids of each member.
        non_members: token ids of each non-member.
        passage_tokens: length of a passage that two documents do not share by chance.
        null_model: the audit of a model that saw no member, if there is one.
        seed: of the blind baseline's halves and bootstrap.
    """
    blind = blind_baseline(members, non_members, seed=seed)
    overlap = Overlap(
        duplicates(members, non_members),
        near_copies(members, non_members),
        shared_passages(members, non_members, passage_tokens),
    )
    return Checks(
        blind_auc=None if blind is None else Estimate(value=blind.auc, low=blind.low, high=blind.high),
        null_model=None
        if null_model is None
        else NullModel(name=null_model.name, strongest=null_model.strongest, p_value=null_model.strongest_p_value),
        duplicates=overlap.exact,
        near_duplicates=overlap.near,
        shared_passages=overlap.passages,
        warnings=warnings_of(blind, overlap, null_model),
        void=(blind is not None and blind.is_void) or overlap.is_void,
    )


def blind_baseline(members: Sequence[TokenIds], non_members: Sequence[TokenIds], *, seed: int) -> BlindBaseline | None:
    """Judge documents by their token ids alone: tf-idf and logistic regression, trained on the other half.

    Audits whose members and non-members came from different sources were found out by just that (Das, Zhang and Tramer
    2024, arXiv 2406.16201; Meeus et al. 2024, arXiv 2406.17975).

    Args:
        members: token ids of each member.
        non_members: token ids of each non-member.
        seed: of the halves and of the bootstrap.

    Returns:
        The out-of-fold AUC and its interval; None where there are too few documents to learn from.
    """
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    if min(len(members), len(non_members)) < FEWEST:
        return None
    documents = [*members, *non_members]
    ids, offsets = np.concatenate(documents), np.cumsum([0, *map(len, documents)])
    counts = scipy.sparse.csr_matrix((np.ones(len(ids)), ids, offsets), shape=(len(documents), int(ids.max()) + 1))
    counts.sum_duplicates()
    model = make_pipeline(TfidfTransformer(sublinear_tf=True), LogisticRegression(max_iter=1000))
    scores = cross_fitted_scores(model, counts, len(members), seed)
    low, high = bootstrap_interval(*scores, confidence=BLIND_CONFIDENCE, seed=seed, widening=WIDENING)
    return BlindBaseline(roc_auc(*scores), low, high)


def duplicates(members: Sequence[TokenIds], non_members: Sequence[TokenIds]) -> float:
    """Return the share of non-members that are, token by token, a member."""
    known = {_digest(ids) for ids in members}
    return float(np.mean([_digest(ids) in known for ids in non_members])) if non_members else 0.0


def _digest(ids: TokenIds) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()


def warnings_of(blind: BlindBaseline | None, overlap: Overlap, null_model: ModelAudit | None) -> list[str]:
    """Return what makes an audit's figures doubtful.

    Args:
        blind: the bag of words' success, if there were enough documents.
        overlap: of members and non-members.
        null_model: the audit of a model that saw no member, if there is one.
    """
    found = []
    if blind is not None and blind.is_void:
        found.append(
            f"void: a bag of words tells members from non-members without any model (AUC {blind.auc:.3f}, from "
            f"{blind.low:.3f}): these lists differ by themselves, and no attack's figure means anything; split one at "
            "random"
        )
    if overlap.exact > MOST_DUPLICATES:
        found.append(
            f"void: {overlap.exact:.1%} of the non-members are members word for word, so that no attack can tell them "
            "apart: take them out of one list, or run `dualtok prepare` on raw data"
        )
    elif overlap.near > MOST_DUPLICATES:
        found.append(
            f"void: {overlap.near:.1%} of the non-members are nearly the same as a member: take near duplicates out of "
            "one list, or run `dualtok prepare` on raw data"
        )
    if overlap.passages > MOST_SHARED:
        found.append(
            f"void: {overlap.passages:.1%} of the non-members share a passage of {PASSAGE_CHARACTERS} characters "
            "with a member: remove near duplicates (data.near_duplicate_threshold)"
        )
    if null_model is not None and _finds(null_model):
        found.append(
            f"{null_model.strongest.label} finds members in {null_model.name!r}, which saw none (two-sided AUC "
            f"{null_model.strongest.auc_two_sided.value:.3f}): members and non-members differ by themselves"
        )
    return found


def _finds(model: ModelAudit) -> bool:
    """Whether an attack works on this model, by the corrected interval and by the permuted labels.

    Of few resamples the ends of an interval that is corrected for many attacks are uncertain; the two together cry wolf
    in at most one sound audit of 20.
    """
    by_chance = model.strongest_p_value is not None and model.strongest_p_value > SURPRISING
    return model.strongest.auc_two_sided.low > 0.5 and not by_chance


def strongest_p_value(
    scores: Mapping[str, tuple[Floats, Floats]],
    *,
    permutations: int,
    seed: int,
    widening: Mapping[str, float] | None = None,
) -> float:
    """Return the p-value of the strongest attack, however many were tried.

    The statistic is the largest |AUC - 1/2| / widening of all attacks. Its null distribution comes from giving the
    membership labels to the documents anew, the same labels in every attack, so that attacks that agree are not counted
    twice (Westfall and Young 1993). Cross-fitted scores have learned from the labels, and would have to learn again
    from every permutation; instead their deviation, which is larger than that of fixed scores, is divided by it. Of
    more than :data:`~dualtok.audit.statistics.resampling.MOST_DRAWN` documents the permuted figures are drawn from
    their joint normal law.

    Args:
        scores: attack -> scores of members [n] and of non-members [m], the same documents in each.
        permutations: r; the smallest p-value is 1 / (r + 1).
        seed: of the permutations.
        widening: attack -> :data:`~dualtok.audit.attacks.crossfit.WIDENING` for cross-fitted ones; others have 1.
    """
    pairs = list(scores.values())
    n = len(pairs[0][0])
    factors = np.array([(widening or {}).get(name, 1.0) for name in scores])
    ranks = np.stack([scipy.stats.rankdata(np.concatenate(pair)) for pair in pairs])  # [f, n + m]
    total = ranks.shape[1]
    lowest, pairings = n * (n + 1) / 2, n * (total - n)

    def strongest(labels: Floats) -> Floats:
        auc = (labels @ ranks.T - lowest) / pairings
        return np.asarray((np.abs(auc - 0.5) / factors).max(axis=1))

    truth = (np.arange(total) < n).astype(np.float64)[None, :]
    observed = strongest(truth)[0]
    draw = np.random.default_rng(seed)
    as_strong = 0
    if total > MOST_DRAWN:
        # Rank sums of so many documents are jointly normal under random labels, with these very covariances.
        covariance = np.atleast_2d(np.cov(ranks)) * (pairings / total)
        sums = draw.multivariate_normal(np.zeros(len(ranks)), covariance, permutations, method="eigh")
        null = (np.abs(sums / pairings) / factors).max(axis=1)
        return (int(np.count_nonzero(null >= observed - 1e-12)) + 1) / (permutations + 1)
    for start in range(0, permutations, BLOCK):
        labels = draw.permuted(np.repeat(truth, min(BLOCK, permutations - start), axis=0), axis=1)
        as_strong += int(np.count_nonzero(strongest(labels) >= observed - 1e-12))
    return (as_strong + 1) / (permutations + 1)
