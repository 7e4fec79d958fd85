"""All attacks on one model at once: those that are functions of a document's signals, and those that learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dualtok.audit.adaptive import CLASSIFIERS, classifier_scores, features
from dualtok.audit.attacks import ATTACKS, AttackContext

if TYPE_CHECKING:
    from dualtok.audit.config import AuditConfig
    from dualtok.audit.signals import Signals

PairOfScores = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Scores of members and of non-members, higher = member."""

FEWEST_TO_LEARN = 20
"""Members, and non-members, below which no classifier is trained: its figure would say nothing."""


def attack_scores(
    targets: tuple[Signals, Signals], contexts: tuple[AttackContext, AttackContext], config: AuditConfig
) -> tuple[dict[str, PairOfScores], dict[str, str]]:
    """Run the attacks of ``config`` on the members' and non-members' signals of a model.

    Returns:
        Name -> scores of every attack that could run, and label -> reason of the others.
    """
    available = contexts[0].has & contexts[1].has
    enough = min(target.n_documents for target in targets) >= FEWEST_TO_LEARN
    scores: dict[str, PairOfScores] = {}
    not_run: dict[str, str] = {}
    known: list[NDArray[np.float64]] = []
    for name in config.attacks:
        missing = needs_of(name) - available
        if missing:
            not_run[label_of(name)] = f"needs {' and '.join(sorted(missing))}"
        elif name in ATTACKS:
            scores[name] = ATTACKS[name](targets[0], contexts[0]), ATTACKS[name](targets[1], contexts[1])
        elif not enough:
            not_run[label_of(name)] = f"needs {FEWEST_TO_LEARN} members and non-members to learn from"
        else:
            known = known or [features(target, context.reference_for(target))
                              for target, context in zip(targets, contexts, strict=True)]  # fmt: skip
            scores[name] = classifier_scores(known[0], known[1], CLASSIFIERS[name][0], config.seed)
    return scores, not_run


def needs_of(attack: str) -> frozenset[str]:
    """Return what an attack needs, of "reference" and "zlib"."""
    return ATTACKS[attack].needs if attack in ATTACKS else frozenset({"reference"})


def label_of(attack: str) -> str:
    """Return an attack's name in tables."""
    return ATTACKS[attack].label if attack in ATTACKS else CLASSIFIERS[attack][1]


def source_of(attack: str) -> str:
    """Return one line: the score, and where it was published."""
    return ATTACKS[attack].source if attack in ATTACKS else CLASSIFIERS[attack][2]
