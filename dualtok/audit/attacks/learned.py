"""Attacks that shadow models teach: which documents a shadow learned is known, and what it gives away of them is seen.

A classifier learns from the shadows how the signals of a document look that its model learned, and of one that it did
not, and then judges the documents of the audited model. Shadows of the dual objective teach it what that objective
leaves behind, so that it needs no label of the audited model. Every document is in half of the shadows, whatever its
membership, so that the document itself teaches nothing.

Legend: n documents, f features, r rows (documents of all shadows together).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dualtok.audit.attacks.adaptive import features, forest
from dualtok.audit.attacks.base import attack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dualtok.audit.attacks.base import AttackContext, Scores
    from dualtok.audit.signals.signals import Signals

    Floats = NDArray[np.float64]
    Labels = NDArray[np.bool_]

CLASSIFIER = "shadow_classifier"
ENCODER = "lt_mia"
MOST_ROWS = 20_000
"""Documents of all shadows together that a classifier learns from; of more, that many are drawn."""


@attack(
    CLASSIFIER,
    "Shadow",
    "randomized trees on how s(t) and the loss are spread, learned from shadow models (after Shokri et al. 2017; "
    "dualtok)",
    kind="shadows",
    needs=("reference", "shadows"),
)
def shadow_classifier_score(target: Signals, context: AttackContext) -> Scores:
    """Probability of a member by a classifier of :func:`.adaptive.features` that learned from shadow models."""
    return context.learned_for(target, CLASSIFIER)


@attack(
    ENCODER,
    "LT-MIA",
    "a small transformer over a document's tokens under model and reference, learned from shadow models (Ilić et al. "
    "2026, arXiv 2604.03199)",
    kind="shadows",
    needs=("reference", "shadows"),
    on_demand=True,
)
def lt_mia_score(target: Signals, context: AttackContext) -> Scores:
    """Logit of a member by :class:`.encoder.Encoder`, which learned from shadow models."""
    return context.learned_for(target, ENCODER)


@dataclass(frozen=True)
class ShadowClassifier:
    """A classifier of the features of documents."""

    model: Any
    """Fitted scikit-learn classifier with ``predict_proba``."""

    def __call__(self, target: Signals, reference: Signals) -> Scores:
        """Return the probability [n] that the model learned each document.

        Args:
            target: signals of a model.
            reference: signals of the attacker's reference, token by token aligned with them.
        """
        scores: Scores = self.model.predict_proba(features(target, reference))[:, 1].astype(np.float64)
        return scores


def fit_shadow_classifier(rows: Sequence[tuple[Floats, Labels]], seed: int) -> ShadowClassifier:
    """Learn to tell the documents that a shadow learned from those that it did not.

    Args:
        rows: of each shadow, the features [r, f] of documents and whether it learned them [r].
        seed: of the trees.

    Raises:
        ValueError: the shadows learned all the documents, or none.
    """
    x, y = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    if y.all() or not y.any():
        raise ValueError(f"{len(y)} documents of shadow models, of which {np.count_nonzero(y)} were learned")
    return ShadowClassifier(forest(seed).fit(x, y))


def choose_rows(documents: int, shadows: int, shadow: int, seed: int, most: int) -> NDArray[np.int64]:
    """Return the positions, ascending, of one shadow's documents that a classifier learns from.

    Args:
        documents: number of documents that each shadow was run over.
        shadows: number of shadows.
        shadow: number of this one, from 0.
        seed: of the draw.
        most: documents of all shadows together.
    """
    share = max(1, most // shadows)
    if documents <= share:
        return np.arange(documents)
    draw = np.random.default_rng([seed, shadow])
    return np.sort(draw.choice(documents, size=share, replace=False))
