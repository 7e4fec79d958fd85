"""LiRA, the likelihood-ratio attack (Carlini et al. 2022, arXiv 2112.03570), from the signals of shadow models.

Shadow models are trained like the audited model, each on its own half of the members and non-members together. For
every document the attacker sees what a model gives that learned it (IN) and one that did not (OUT), fits a Gaussian to
each, and asks which of the two the audited model's figure is likelier under. Which documents are members of the audited
model plays no part in the fit.

Legend: n documents, s shadows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.base import ShadowFit, attack
from dualtok.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dualtok.audit.attacks.base import AttackContext
    from dualtok.audit.signals.signals import Signals

    Floats = NDArray[np.float64]

LOSS_FLOOR = 1e-6
"""Mean loss in nats below which float32 holds rounding noise; the statistic would grow without bound."""
SIGMA_FLOOR = 1e-6
PER_DOCUMENT_FROM = 64
"""Shadows from which every document has deviations of its own; fewer are too few for that (the paper, section VI-C)."""


def statistic(mean_loss: Floats) -> Floats:
    """Return the logit of the geometric mean probability of a document's tokens, log p - log(1 - p), p = exp(-CE).

    The paper scales a classifier's confidence so, because its distribution over models is then close to a Gaussian's.
    For losses of several nats it is nearly minus the mean loss.

    Args:
        mean_loss: mean cross-entropy of each document, in nats per token, of any shape.
    """
    loss = np.maximum(np.asarray(mean_loss, dtype=np.float64), LOSS_FLOOR)
    logit: Floats = -loss - np.log(-np.expm1(-loss))
    return logit


def fit_shadows(document: NDArray[np.int64], values: Floats, inside: NDArray[np.bool_]) -> ShadowFit:
    """Fit a Gaussian to the IN and one to the OUT shadows of each document.

    The means are each document's own. The deviations are its own from :data:`PER_DOCUMENT_FROM` shadows on (divided by
    their number, as in the paper's code). Fewer shadows share one deviation for IN and one for OUT: that of all values
    about their own document's mean, corrected for the means (the paper's code takes the deviation about the mean of
    all, which holds the differences between documents too). Two shadows have one value each of a document, and both
    deviations are that of IN minus OUT over the documents, divided by sqrt(2).

    Args:
        document: ids [n].
        values: :func:`statistic` of each document under each shadow [s, n].
        inside: whether the shadow learned the document [s, n].

    Raises:
        ValueError: shapes do not fit, or a document lacks an IN or an OUT shadow.
    """
    if values.shape != inside.shape or values.shape[1:] != document.shape:
        raise ValueError(f"values {values.shape} and inside {inside.shape} for {document.shape[0]} documents")
    sides = [np.ma.masked_array(values, mask=~chosen) for chosen in (inside, ~inside)]
    counts = [side.count(axis=0) for side in sides]
    if min(count.min() for count in counts) < 1:
        raise ValueError("a document has no shadow that learned it, or none that did not")
    means = [side.mean(axis=0).filled() for side in sides]
    if len(values) >= PER_DOCUMENT_FROM:
        sigmas = [side.std(axis=0).filled() for side in sides]
    elif min((count - 1).sum() for count in counts) > 0:
        sigmas = [
            np.sqrt(((side - mean) ** 2).sum() / (count - 1).sum())
            for side, mean, count in zip(sides, means, counts, strict=True)
        ]
    else:
        sigmas = [np.std(means[0] - means[1]) / np.sqrt(2)] * 2
    spreads = [np.broadcast_to(np.maximum(sigma, SIGMA_FLOOR), document.shape) for sigma in sigmas]
    return ShadowFit(document, means[0], means[1], spreads[0], spreads[1])


@attack(
    "lira",
    "LiRA",
    "log-likelihood ratio of a document's loss under shadow models that learned it and others (Carlini et al. 2022, "
    "online)",
    kind="shadows",
    needs=("shadows",),
)
def lira_score(target: Signals, context: AttackContext) -> Floats:
    """Log-likelihood of the statistic under the IN Gaussian minus that under the OUT Gaussian."""
    fit, value = _fit_of(target, context), statistic(target.mean_loss)
    z_in, z_out = (value - fit.mean_in) / fit.sigma_in, (value - fit.mean_out) / fit.sigma_out
    return (z_out**2 - z_in**2) / 2 + np.log(fit.sigma_out / fit.sigma_in)


@attack(
    "lira_offline",
    "LiRA out",
    "deviations of a document's loss from those under shadow models that did not learn it (Carlini et al. 2022, "
    "offline)",
    kind="shadows",
    needs=("shadows",),
)
def lira_offline_score(target: Signals, context: AttackContext) -> Floats:
    """How many deviations the statistic lies above the OUT Gaussian's mean.

    The paper's score is the probability of a smaller value under that Gaussian, which orders documents alike but is
    rounded to 1 for the surest of them.
    """
    fit = _fit_of(target, context)
    return (statistic(target.mean_loss) - fit.mean_out) / fit.sigma_out


def _fit_of(target: Signals, context: AttackContext) -> ShadowFit:
    if context.shadows is None:
        raise DataError("audit: this attack needs shadow models (`dualtok audit --shadows N`)")
    return context.shadows.of(target.document)
