"""All attacks on one model at once: functions of a document's signals, and those that know the defence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.adaptive import ADAPTIVE, features, scores_of
from dualtok.audit.attacks import ATTACKS, AttackContext
from dualtok.audit.further import FURTHER
from dualtok.audit.lira import LIRA

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dualtok.audit.config import AuditConfig
    from dualtok.audit.signals import Signals

    Floats = NDArray[np.float64]
    PairOfScores = tuple[Floats, Floats]


BY_DOCUMENT = ATTACKS | FURTHER | LIRA
"""Attacks that score each document by itself."""


@dataclass(frozen=True)
class Scored:
    """What all attacks found on one model's members and non-members."""

    scores: dict[str, PairOfScores]
    """Name of every attack that could run -> scores of the members and of the non-members, higher = member."""
    not_run: dict[str, str]
    """Label of every other attack -> the reason."""
    known: tuple[Floats, Floats]
    """All that was computed of each document without knowing of its membership, [n, f] and [m, f]: to learn from."""


def attack_scores(
    targets: tuple[Signals, Signals], contexts: tuple[AttackContext, AttackContext], config: AuditConfig
) -> Scored:
    """Run the attacks of ``config`` on the members' and non-members' signals of a model."""
    available = contexts[0].has & contexts[1].has
    enough = min(target.n_documents for target in targets)
    found: dict[str, PairOfScores] = {}
    not_run: dict[str, str] = {}
    adaptive: list[str] = []
    for name in config.attacks:
        missing = needs_of(name) - available
        if missing:
            reasons = [contexts[0].missing_passes.get(need, need) for need in sorted(missing)]
            not_run[label_of(name)] = f"needs {' and '.join(dict.fromkeys(reasons))}"
        elif name in BY_DOCUMENT:
            found[name] = BY_DOCUMENT[name](targets[0], contexts[0]), BY_DOCUMENT[name](targets[1], contexts[1])
        elif enough < ADAPTIVE[name].fewest:
            not_run[label_of(name)] = f"needs {ADAPTIVE[name].fewest} members and non-members to learn from"
        else:
            adaptive.append(name)
    blocks = [np.stack([pair[side] for pair in found.values()] or [np.zeros(targets[side].n_documents)], axis=1)
              for side in (0, 1)]  # fmt: skip
    if "reference" in available:
        spread = [features(target, context.reference_for(target))
                  for target, context in zip(targets, contexts, strict=True)]  # fmt: skip
        found |= scores_of(spread[0], spread[1], config.seed, adaptive)
        blocks = [np.concatenate(pair, axis=1) for pair in zip(blocks, spread, strict=True)]
    ordered: dict[str, PairOfScores] = {name: found[name] for name in config.attacks if name in found}
    return Scored(scores=ordered, not_run=not_run, known=(blocks[0], blocks[1]))


def needs_of(attack: str) -> frozenset[str]:
    """Return what an attack needs; see :attr:`~dualtok.audit.attacks.Attack.needs`."""
    return BY_DOCUMENT[attack].needs if attack in BY_DOCUMENT else frozenset({"reference"})


def label_of(attack: str) -> str:
    """Return an attack's name in tables."""
    return BY_DOCUMENT[attack].label if attack in BY_DOCUMENT else ADAPTIVE[attack].label


def source_of(attack: str) -> str:
    """Return one line: the score, and where it was published."""
    return BY_DOCUMENT[attack].source if attack in BY_DOCUMENT else ADAPTIVE[attack].source


def widening_of(attack: str) -> float:
    """Return how often the deviations of an attack's figures are counted; see :mod:`dualtok.audit.crossfit`."""
    return ADAPTIVE[attack].widening if attack in ADAPTIVE else 1.0
