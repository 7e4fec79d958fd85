"""What a model gives away of canaries: documents that a fair coin put into its training data or kept out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.report.base import Estimate
from dualtok.audit.report.data import CanaryAudit, CanaryScore, EpsilonBound, Exposures
from dualtok.audit.signals.ragged import segment_sum
from dualtok.audit.statistics.epsilon import best_bound
from dualtok.audit.statistics.exposure import extrapolated_exposure, ranked_exposure
from dualtok.audit.statistics.metrics import bootstrap_interval, roc_auc
from dualtok.audit.statistics.regurgitation import exact_share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dualtok.audit.settings import AuditConfig
    from dualtok.audit.signals.signals import Signals

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CanaryTexts:
    """The canaries as a model sees them. Legend: c canaries, n candidates of each."""

    included: NDArray[np.bool_]
    """How the coins fell [c]."""
    secret: NDArray[np.int64]
    """First token of the secret and one past its last [c, 2], counted in the tokens of the whole text."""
    candidates: int
    """n: texts with another secret; text ``i * (n + 1)`` is canary i, those up to the next one its candidates."""
    space: int
    """|R|, the secrets that each was drawn from."""


def audit_canaries(
    target: Signals, texts: CanaryTexts, config: AuditConfig, reference: Signals | None = None
) -> CanaryAudit:
    """State what a model gives away of canaries.

    Args:
        target: the model's signals over canaries and candidates, by the numbers of :class:`CanaryTexts`.
        texts: the canaries.
        config: confidence, resamples, ``canary_guesses`` and ``canary_delta``.
        reference: the attacker's reference model's signals over the canaries alone, by the same numbers, if it has one.
    """
    total = log_perplexity(target).reshape(len(texts.included), texts.candidates + 1)
    loss, others = total[:, 0], total[:, 1:]
    numbers = np.arange(len(texts.included)) * (texts.candidates + 1)
    own = target.select(numbers)
    scores = {"Loss": -own.mean_loss}
    if reference is not None:
        scores["Ref"] = reference.select(numbers).mean_loss - own.mean_loss
    extracted = extractions(own, texts.secret)
    deltas = dict.fromkeys((0.0, config.canary_delta))
    ranked = ranked_exposure(loss, others)
    extrapolated = extrapolated_exposure(loss, others, texts.space)
    sides = (texts.included, ~texts.included)
    return CanaryAudit(
        n_included=int(texts.included.sum()),
        n_excluded=int((~texts.included).sum()),
        scores=[_score(label, values, texts.included, config) for label, values in scores.items()],
        epsilon=[_epsilon(scores, texts.included, delta, config) for delta in deltas],
        space_bits=math.log2(texts.space),
        candidates=texts.candidates,
        ranked=Exposures(included=ranked[sides[0]].tolist(), excluded=ranked[sides[1]].tolist()),
        extrapolated=Exposures(included=extrapolated[sides[0]].tolist(), excluded=extrapolated[sides[1]].tolist()),
        extracted_included=exact_share(extracted[sides[0]], config.confidence),
        extracted_excluded=exact_share(extracted[sides[1]], config.confidence),
    )


def log_perplexity(signals: Signals) -> Floats:
    """Return the sum of -log p over each document's predicted tokens [n], in nats."""
    return -segment_sum(signals.log_prob, signals.offsets)


def extractions(signals: Signals, secret: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which secrets greedy decoding gives back word for word after their prefix [c].

    It does so exactly if each token of the secret is the likeliest one after all before it, which one forward pass over
    the text tells. (A tie counts as reproduced; another tokenisation of the same text does not.)

    Args:
        signals: of the canaries, c documents of one piece each: token j is predicted at place j - 1.
        secret: first token of each secret and one past its last, [c, 2]; the first is at least 1.
    """
    starts = signals.offsets[:-1, None] - 1 + secret
    return np.array([bool(signals.top1[first:end].all()) for first, end in starts], dtype=bool)


def _score(label: str, values: Floats, included: NDArray[np.bool_], config: AuditConfig) -> CanaryScore:
    pair = values[included], values[~included]
    if not all(map(len, pair)):
        return CanaryScore(label=label, auc=None)
    low, high = bootstrap_interval(
        *pair, resamples=config.bootstrap_resamples, confidence=config.confidence, seed=config.seed
    )
    return CanaryScore(label=label, auc=Estimate(value=roc_auc(*pair), low=low, high=high))


def _epsilon(scores: dict[str, Floats], included: NDArray[np.bool_], delta: float, config: AuditConfig) -> EpsilonBound:
    guesses = guess_counts(len(included), config.canary_guesses)
    which, bound = best_bound(list(scores.values()), included, guesses, delta=delta, confidence=config.confidence)
    return EpsilonBound(
        delta=delta,
        epsilon=bound.epsilon,
        label=list(scores)[which],
        guesses=bound.guesses,
        correct=bound.correct,
        tests=len(scores) * len(guesses),
    )


def guess_counts(canaries: int, shares: Sequence[float]) -> list[int]:
    """Return the numbers of guesses that some shares of the canaries are, each once and at least one."""
    return list(dict.fromkeys(max(1, round(share * canaries)) for share in shares))
