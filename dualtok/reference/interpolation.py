"""Interpolation towards the reference: how far a trained model may be from it before an attacker sees its members.

With theta(w) = theta_ref + w (theta - theta_ref), what a model has learned grows faster than what it gives away while w
is small. The reference has seen no member, so w = 0 gives nothing away; the largest w is taken for which an attacker
with a reference of their own is expected to reach no more than a given AUC. Interpolating the weights of a fine-tuned
model and its start is known from WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903), which does it for robustness, and
from scaling a task vector (Ilharco et al. 2023, arXiv 2212.04089).

Legend: m members, n non-members, each a document.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# Imported where they are used, for what they take to load: scipy (half a second).

RESOLUTION = 0.005
"""How exactly w is found."""


def expected_auc(
    members: tuple[Floats, Floats, Floats], non_members: tuple[Floats, Floats, Floats], confidence: float = 0.5
) -> float:
    """Return the AUC of Ref that an attacker is expected to reach: Phi(gap / (sqrt(2) sigma)), both classes normal.

    The gap is that of s(t) by the *defender's* reference, for which it is exactly 0 where the model is that reference:
    what members and non-members differ by beforehand drops out. The spread sigma is that of s(t) by the surrogate
    of the attacker's reference.

    Args:
        members: mean loss of each member [m] under the model, the defender's reference and the surrogate, in nats.
        non_members: the same of the non-members [n].
        confidence: of the gap: its one-sided upper end is taken, as far as documents were drawn by chance; .5 takes
            the gap that was seen.
    """
    from scipy.stats import norm

    learned = [side[0] - side[1] for side in (members, non_members)]
    error = np.sqrt(sum(np.var(side, ddof=1) / len(side) for side in learned))
    gap = np.mean(learned[1]) - np.mean(learned[0]) + norm.ppf(confidence) * error
    spreads = [np.var(side[0] - side[2], ddof=1) for side in (members, non_members)]
    return float(norm.cdf(gap / np.sqrt(2 * np.mean(spreads))))


def largest_weight(auc_at: Callable[[float], float], limit: float) -> float:
    """Return the w in [0, 1] at which ``auc_at`` reaches ``limit`` (Brent's method), or 1 if it does not.

    ``auc_at`` is called once per trial, about six times; it must be .5 at 0, where it is not called.
    """
    from scipy.optimize import brentq

    whole = auc_at(1.0) - limit
    if whole <= 0:
        return 1.0
    known = {0.0: 0.5 - limit, 1.0: whole}
    return float(brentq(lambda w: known[w] if w in known else auc_at(w) - limit, 0.0, 1.0, xtol=RESOLUTION, maxiter=20))
