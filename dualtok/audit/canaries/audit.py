"""What a model gives away of canaries: documents that a fair coin put into its training data or kept out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.canaries.bounds import CHOSEN, canary_bounds
from dualtok.audit.canaries.exposure import extrapolated_exposure, ranked_exposure
from dualtok.audit.report.base import Estimate
from dualtok.audit.report.data import CanaryAudit, CanaryScore, Exposures
from dualtok.audit.signals.ragged import segment_sum
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
    secret: NDArray[np.int64] | None
    """First token of the secret and one past its last [c, 2], counted in the tokens of the whole text; None if canaries
    have none."""
    candidates: int
    """n: texts with another secret; text ``i * (n + 1)`` is canary i, those up to the next one its candidates. With 0
    there is no exposure."""
    space: int
    """|R|, the secrets that each was drawn from; 1 if there are no others."""
    kind: str = ""
    """``data.canaries.kind``."""
    judged_by_secret: bool = False
    """Whether the secret's tokens alone are scored, and not the whole text."""


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
    numbers = np.arange(len(texts.included)) * (texts.candidates + 1)
    own = target.select(numbers)
    scores = {"Loss": -_judged_loss(own, texts)}
    if reference is not None:
        scores["Ref"] = _judged_loss(reference.select(numbers), texts) - _judged_loss(own, texts)
    deltas = list(dict.fromkeys((0.0, config.canary_delta)))
    guesses = guess_counts(len(texts.included), config.canary_guesses)
    bounds = canary_bounds(scores, texts.included, guesses, deltas, config.confidence)
    ranked, extrapolated = _exposures(target, texts)
    extracted = [None, None] if texts.secret is None else _extracted(own, texts.secret, texts.included, config)
    return CanaryAudit(
        n_included=int(texts.included.sum()),
        n_excluded=int((~texts.included).sum()),
        kind=texts.kind,
        scores=[_score(label, values, texts.included, config) for label, values in scores.items()],
        epsilon=[bound for bound in bounds if bound.method == CHOSEN],
        other_bounds=[bound for bound in bounds if bound.method != CHOSEN],
        space_bits=math.log2(texts.space),
        candidates=texts.candidates,
        ranked=ranked,
        extrapolated=extrapolated,
        extracted_included=extracted[0],
        extracted_excluded=extracted[1],
    )


def _exposures(target: Signals, texts: CanaryTexts) -> tuple[Exposures, Exposures]:
    """Return exposures by rank and by a fit; empty ones if there is nothing to rank the canaries among."""
    if not texts.candidates:
        return Exposures(included=[], excluded=[]), Exposures(included=[], excluded=[])
    total = log_perplexity(target).reshape(len(texts.included), texts.candidates + 1)
    loss, others = total[:, 0], total[:, 1:]
    both = ranked_exposure(loss, others), extrapolated_exposure(loss, others, texts.space)
    ranked, extrapolated = (
        Exposures(included=values[texts.included].tolist(), excluded=values[~texts.included].tolist())
        for values in both
    )
    return ranked, extrapolated


def _extracted(
    own: Signals, secret: NDArray[np.int64], included: NDArray[np.bool_], config: AuditConfig
) -> list[Estimate | None]:
    """Return the extracted shares of the canaries that were included and of those left out."""
    extracted = extractions(own, secret)
    return [exact_share(extracted[side], config.confidence) for side in (included, ~included)]


def _judged_loss(signals: Signals, texts: CanaryTexts) -> Floats:
    """Return the mean of -log p over the tokens that canaries are scored by [c], in nats."""
    if not texts.judged_by_secret:
        return signals.mean_loss
    assert texts.secret is not None
    return np.array([-signals.log_prob[first:end].mean() for first, end in _places(signals, texts.secret)])


def _places(signals: Signals, secret: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the predictions of each secret's tokens lie among all: first place and one past the last [c, 2]."""
    places: NDArray[np.int64] = signals.offsets[:-1, None] - 1 + secret
    return places


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
    return np.array([bool(signals.top1[first:end].all()) for first, end in _places(signals, secret)], dtype=bool)


def _score(label: str, values: Floats, included: NDArray[np.bool_], config: AuditConfig) -> CanaryScore:
    pair = values[included], values[~included]
    if not all(map(len, pair)):
        return CanaryScore(label=label, auc=None)
    low, high = bootstrap_interval(
        *pair, resamples=config.bootstrap_resamples, confidence=config.confidence, seed=config.seed
    )
    return CanaryScore(label=label, auc=Estimate(value=roc_auc(*pair), low=low, high=high))


def guess_counts(canaries: int, shares: Sequence[float]) -> list[int]:
    """Return the numbers of guesses that some shares of the canaries are, each once and at least one."""
    return list(dict.fromkeys(max(1, round(share * canaries)) for share in shares))
