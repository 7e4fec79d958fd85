"""Membership-inference attacks that need one forward pass per model: pure functions of the signals.

Every attack gives one float64 score per document, and a higher score says "member".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.base import attack
from dualtok.audit.signals.ragged import lowest_mean

if TYPE_CHECKING:
    from dualtok.audit.attacks.base import AttackContext, Scores
    from dualtok.audit.signals.signals import Signals

# A model can be so sure that float32 leaves no variance; below this standard deviation (in nats) it is rounding noise.
SIGMA_FLOOR = 1e-4


@attack("loss", "Loss", "minus the mean loss (Yeom et al. 2018)", headline=True)
def loss_score(target: Signals, context: AttackContext) -> Scores:
    """Minus the mean cross-entropy of the document."""
    return -target.mean_loss


@attack(
    "ref",
    "Ref",
    "mean loss under a reference model minus mean loss (Carlini et al. 2021; Mireshghallah et al. 2022)",
    needs=("reference",),
    headline=True,
)
def ref_score(target: Signals, context: AttackContext) -> Scores:
    """Mean cross-entropy under the reference minus that under the target: minus the document's mean s(t)."""
    return context.reference_for(target).mean_loss - target.mean_loss


@attack(
    "zlib",
    "Zlib",
    "minus the mean loss per token divided by the zlib-compressed bytes of the text (Carlini et al. 2021)",
    needs=("zlib",),
    headline=True,
)
def zlib_score(target: Signals, context: AttackContext) -> Scores:
    """Minus the mean cross-entropy (nats per token, not the sum) divided by the document's compressed bytes."""
    return -target.mean_loss / context.zlib_for(target)


@attack("min_k", "Min-K%", "mean log-probability of the least likely tokens (Shi et al. 2024)", headline=True)
def min_k_score(target: Signals, context: AttackContext) -> Scores:
    """Mean log p of the document's least likely tokens."""
    return lowest_mean(target.log_prob, target.offsets, context.min_k_share)


@attack(
    "min_k_plus_plus",
    "Min-K%++",
    "the same after standardizing each log-probability over the vocabulary (Zhang et al. 2024)",
    headline=True,
)
def min_k_plus_plus_score(target: Signals, context: AttackContext) -> Scores:
    """Mean of the document's lowest (log p - mu) / sigma, mu and sigma over the vocabulary under p itself."""
    sigma = np.maximum(np.sqrt(target.var_log_prob.astype(np.float64)), SIGMA_FLOOR)
    normalized = (target.log_prob.astype(np.float64) - target.mean_log_prob) / sigma
    return lowest_mean(normalized, target.offsets, context.min_k_share)
