"""RMIA (Zarifzadeh, Liu and Shokri, ICML 2024, arXiv 2312.03262), offline and with one reference model.

A document x is compared with documents z of the population, which the model did not learn:

    LR(x, z) = [p(x | model) / p(x)] / [p(z | model) / p(z)],    score(x) = share of the z with LR(x, z) >= gamma.

p(x) is the mean over models that learned x and models that did not. Offline there are only the latter, and the paper
takes p_in = a p_out + 1 - a, so that p(x) = ((1 + a) p_out + 1 - a) / 2. For a language model p(x | model) is the
geometric mean of the tokens' probabilities, exp(-CE), as in the authors' Privacy Meter.

Legend: n members, m non-members, f features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.adaptive import FEATURES
from dualtok.audit.attacks.base import attack_on_features
from dualtok.audit.attacks.crossfit import FOLDS, folds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dualtok.audit.attacks.base import PairOfScores

    Floats = NDArray[np.float64]

OFFLINE_A = 0.3
"""The paper's a: 1 takes the reference's probability for p(x), 0 does without the reference. The default of the
authors' code; they also choose it by attacking a second model whose members they know, which an attacker with one
reference has not."""
GAMMA = 1.0
"""The paper's gamma, as in the authors' Privacy Meter, which attacks language models too. The paper's image classifiers
are attacked with 2; geometric means of many tokens rarely differ by that factor, and most scores would be 0."""


def log_ratio(mean_loss: Floats, reference_loss: Floats, a: float = OFFLINE_A) -> Floats:
    """Return log(p(x | model) / p(x)) of each document [n].

    Args:
        mean_loss: CE of each document under the model, in nats per token [n].
        reference_loss: the same under a model that did not learn it [n].
        a: the paper's offline coefficient, 0 to 1.
    """
    ratio: Floats = -mean_loss - np.log(((1 + a) * np.exp(-reference_loss) + 1 - a) / 2)
    return ratio


def dominated_share(ratio: Floats, population: Floats, gamma: float = GAMMA) -> Floats:
    """Return the share [n] of the population that each document dominates: LR(x, z) >= gamma.

    Args:
        ratio: :func:`log_ratio` of the documents [n].
        population: the same of the population, at least one document.
        gamma: the paper's threshold.
    """
    below = np.searchsorted(np.sort(population), ratio - np.log(gamma), side="right")
    share: Floats = below / len(population)
    return share


@attack_on_features(
    "rmia",
    "RMIA",
    "share of other non-members whose probability, over the reference's, is smaller (Zarifzadeh et al. 2024, offline)",
    kind="single_pass",
    fewest=FOLDS,
)
def rmia_scores(members: Floats, non_members: Floats, seed: int) -> PairOfScores:
    """Return the share of the population that each document dominates.

    The population are the non-members of the other half: an attacker may know non-members, not the ones they judge.

    Args:
        members: features [n, f].
        non_members: features [m, f].
        seed: of the halves.
    """
    n = len(members)
    loss, calibrated = (
        np.concatenate([members[:, column], non_members[:, column]])
        for column in (FEATURES.index("mean loss"), FEATURES.index("mean"))
    )
    ratio, fold = log_ratio(loss, loss - calibrated), folds(n, len(non_members), seed)
    scores = np.empty(len(ratio))
    for number in range(FOLDS):
        judged = fold == number
        scores[judged] = dominated_share(ratio[judged], ratio[n:][~judged[n:]])
    return scores[:n], scores[n:]
