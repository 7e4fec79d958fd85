"""Published attacks that look at single tokens: which of them count, and how their neighbors vote.

They need what one pass leaves of each token, and two of them the same of a reference. Higher scores say "member".

Legend: n documents, k predicted tokens of all documents together, v vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.base import attack
from dualtok.audit.signals.ragged import lowest, lowest_mean, segment_mean, segment_sum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dualtok.audit.attacks.base import AttackContext
    from dualtok.audit.signals.signals import Signals

    Floats = NDArray[np.float64]
    Offsets = NDArray[np.int64]

CERTAIN = 2.0
"""Entropy in nats below which SURP calls a prediction certain (Zhang and Wu 2024)."""
HIGHEST = 0.01
"""Most that one token adds to DC-PDD (Zhang et al. 2024, the authors' default of their a)."""
WINDOWS = (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)
"""Window sizes of WBC in tokens, geometrically spaced (Chen et al. 2026)."""


@attack(
    "surp", "SURP", "mean log-probability of the least likely tokens where the model is certain (Zhang and Wu 2024)"
)
def surp_score(target: Signals, context: AttackContext) -> Floats:
    """Mean log p of the surprising tokens: certain (entropy below 2 nats) but wrong (log p in the lowest k).

    A document without one takes the mean over its lowest k, whatever their entropy (Min-K%): a part of the same tokens'
    log p, so that having no surprise is neither the best nor the worst score.
    """
    log_p, offsets = target.log_prob, target.offsets
    surprising = lowest(log_p, offsets, context.min_k_share) & (-target.mean_log_prob < CERTAIN)
    count = segment_sum(surprising, offsets)
    score = lowest_mean(log_p, offsets, context.min_k_share)
    np.divide(segment_sum(np.where(surprising, log_p, 0), offsets), count, out=score, where=count > 0)
    return score


@attack(
    "dc_pdd",
    "DC-PDD",
    "clipped cross-entropy of each token's probability and its frequency in a corpus, first occurrences "
    "(Zhang et al. 2024, arXiv 2409.14781)",
    needs=("frequencies",),
)
def dc_pdd_score(target: Signals, context: AttackContext) -> Floats:
    """Mean of min(p * -log f, 0.01) over the first occurrence of each token id in the document.

    f is the id's share of the tokens of a corpus: a likely token says more where it is rare.
    """
    ids, frequencies = context.tokens_for(target)
    document = np.repeat(np.arange(target.n_documents), target.lengths)
    _, positions = np.unique(document * len(frequencies) + ids, return_index=True)
    first = np.zeros(target.n_tokens, dtype=bool)
    first[positions] = True
    entropy = np.exp(target.log_prob.astype(np.float64)) * -np.log(frequencies[ids])
    kept = np.where(first, np.minimum(entropy, HIGHEST), 0.0)
    return segment_sum(kept, target.offsets) / segment_sum(first, target.offsets)


def smoothed_frequencies(counts: NDArray[np.int64]) -> Floats:
    """Return each token id's share of a corpus [v], from its counts [v], with Laplace smoothing: none is 0."""
    frequencies: Floats = (counts + 1) / (counts.sum() + len(counts))
    return frequencies


@attack(
    "wbc",
    "WBC",
    "share of windows of 2 to 40 tokens that the reference predicts worse (Chen et al. 2026, arXiv 2601.02751)",
    needs=("reference",),
)
def wbc_score(target: Signals, context: AttackContext) -> Floats:
    """Share of windows whose loss under the reference exceeds that under the target, averaged over the window sizes.

    Sizes that a document is too short for are left out; one shorter than the smallest is a window itself.
    """
    d, offsets, lengths = _gain(target, context), target.offsets, target.lengths
    left = np.repeat(offsets[1:], lengths) - np.arange(len(d))
    window, votes, sizes = np.zeros(len(d)), np.zeros(len(lengths)), np.zeros(len(lengths))
    for size in range(1, min(max(WINDOWS), lengths.max()) + 1):
        # Window i now reaches over d[i : i + size]; one that leaves its document is no window any more.
        window[: len(d) - size + 1] += d[size - 1 :]
        if size not in WINDOWS and size != 1:
            continue
        fits = lengths >= size if size in WINDOWS else lengths < min(WINDOWS)
        won = segment_sum((window > 0) & (left >= size), offsets)
        votes += np.divide(won, lengths - size + 1, out=np.zeros(len(lengths)), where=fits)
        sizes += fits
    return votes / sizes


@attack(
    "error_zone",
    "EZ",
    "gains over losses against the reference where the likeliest token is wrong (Ilic et al. 2026, arXiv 2601.12104)",
    needs=("reference",),
)
def error_zone_score(target: Signals, context: AttackContext) -> Floats:
    """Of log p_target - log p_reference where the target's likeliest token is wrong: the gains' share of all change.

    With P the sum of the gains and N that of the losses, the published score is P / N. P / (P + N) ranks documents
    alike and is finite where nothing was lost. A document without a wrong token is the strongest sign of a member, as
    in the paper's appendix: 1. The published code gives it, and each one that lost nothing, the weakest score, 0.
    Where tokens are wrong and none has changed it is 1/2: P / N of 1.
    """
    d = np.where(target.top1, 0.0, _gain(target, context))
    gained, lost = segment_sum(np.maximum(d, 0), target.offsets), segment_sum(np.maximum(-d, 0), target.offsets)
    changed, wrong = gained + lost, segment_sum(~target.top1, target.offsets)
    share: Floats = np.divide(gained, changed, out=np.where(wrong > 0, 0.5, 1.0), where=changed > 0)
    return share


@attack(
    "ht_mia",
    "HT-MIA",
    "share of the least likely tokens that the reference predicts worse (Jawad et al. 2026, arXiv 2601.20885)",
    needs=("reference",),
)
def ht_mia_score(target: Signals, context: AttackContext) -> Floats:
    """Share of the hard tokens, the target's least likely ones, whose probability under the target is the higher one.

    Of the paper its abstract alone could be had: gains in probability over a reference at the tokens of low confidence,
    higher = member. That the gains are counted, and that the target (not the reference) says which tokens are hard, was
    taken from an implementation by other authors, who evaluate the lowest 10, 20 and 30 %. The share here is
    ``min_k_share``, by default 20 %; the paper may use another one. A token whose probability is unchanged is no gain.
    """
    hard = lowest(target.log_prob, target.offsets, context.min_k_share)
    gained = segment_sum(hard & (_gain(target, context) > 0), target.offsets)
    return gained / segment_sum(hard, target.offsets)


@attack(
    "info_rmia",
    "InfoRMIA",
    "log-ratio of each token's probabilities plus the reference's divergence from the model (Tao and Shokri 2025, "
    "arXiv 2510.05582)",
    kind="joint",
    needs=("kl_from_reference", "reference"),
)
def info_rmia_score(target: Signals, context: AttackContext) -> Floats:
    """Mean of log (p_target / p_reference) of the token plus KL(p_reference || p_target) over the vocabulary.

    The divergence is what the log-ratio of any other token would cost on average: what is left is this token's own.
    """
    return segment_mean(_gain(target, context) + context.kl_for(target), target.offsets)


def _gain(target: Signals, context: AttackContext) -> Floats:
    """Return log p_target - log p_reference of each token [k]."""
    return target.log_prob.astype(np.float64) - context.reference_for(target).log_prob
