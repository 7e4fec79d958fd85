"""Membership-inference attacks that run a model again, over changed documents: pure functions of what the passes left.

Scores are published as ratios and differences of log-likelihoods; with losses, which are their negatives, the ratios
are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks import Attack, AttackContext, Scores

if TYPE_CHECKING:
    from dualtok.audit.signals import Signals

LOSS_FLOOR = 1e-6
"""In nats: a model that is certain of every token has no loss to divide by."""


def lowercase_score(target: Signals, context: AttackContext) -> Scores:
    """Loss of the text in lower case divided by the loss of the text: the ratio of log-perplexities."""
    known = context.pass_for(target, "lowercase")
    return known["lower_loss"] / np.maximum(known["loss"], LOSS_FLOOR)


def recall_score(target: Signals, context: AttackContext) -> Scores:
    """LL(x | non-members) / LL(x): non-members in front harm what the model knows by heart most."""
    known = context.pass_for(target, "non_member_prefix")
    return known["conditional_loss"] / np.maximum(known["loss"], LOSS_FLOOR)


def con_recall_score(target: Signals, context: AttackContext) -> Scores:
    """(LL(x | non-members) - gamma LL(x | members)) / LL(x)."""
    known = context.pass_for(target, "non_member_prefix")
    given_members = context.pass_for(target, "member_prefix")["conditional_loss"]
    contrast = known["conditional_loss"] - context.con_recall_gamma * given_members
    return contrast / np.maximum(known["loss"], LOSS_FLOOR)


def neighbourhood_score(target: Signals, context: AttackContext) -> Scores:
    """Mean loss of the neighbours minus the loss."""
    known = context.pass_for(target, "neighbours")
    return known["neighbour_loss"] - known["loss"]


def gradient_norm_score(target: Signals, context: AttackContext) -> Scores:
    """Minus the norm of the gradient."""
    return -context.pass_for(target, "gradient")["norm"]


_ALL = (
    Attack(
        "lowercase",
        "Lowercase",
        frozenset({"lowercase"}),
        "loss of the text in lower case divided by the text's (Carlini et al. 2021)",
        lowercase_score,
    ),
    Attack(
        "recall",
        "ReCaLL",
        frozenset({"non_member_prefix"}),
        "log-likelihood after a prefix of non-members divided by that without (Xie et al. 2024)",
        recall_score,
    ),
    Attack(
        "con_recall",
        "Con-ReCall",
        frozenset({"non_member_prefix", "member_prefix"}),
        "log-likelihood after non-members minus gamma times that after members, divided by that without (Wang et al. "
        "2024, arXiv 2409.03363)",
        con_recall_score,
    ),
    Attack(
        "neighbourhood",
        "Neighbours",
        frozenset({"neighbours"}),
        "mean loss of texts with some tokens replaced minus the loss (Mattern et al. 2023; the replacements are the "
        "audited model's own)",
        neighbourhood_score,
    ),
    Attack(
        "gradient_norm",
        "Grad norm",
        frozenset({"gradient"}),
        "minus the L2 norm of the gradient of the loss with respect to all parameters (Wang et al. 2024, arXiv "
        "2402.17012)",
        gradient_norm_score,
    ),
)
FURTHER: dict[str, Attack] = {attack.name: attack for attack in _ALL}
