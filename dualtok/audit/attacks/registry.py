"""All attacks of the registry, and how they are run on one model at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.adaptive import features, scores_of
from dualtok.audit.attacks.base import ATTACKS
from dualtok.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualtok.audit.attacks.base import AttackContext, Kind, PairOfScores, Scores
    from dualtok.audit.signals.signals import Signals


__all__ = ["ATTACKS", "Scored", "attack_scores", "default_attacks", "names_of", "require_attacks"]


@dataclass(frozen=True)
class Scored:
    """What all attacks found on one model's members and non-members."""

    scores: dict[str, PairOfScores]
    """Name of every attack that could run -> scores of the members and of the non-members, higher = member."""
    not_run: dict[str, str]
    """Label of every other attack -> the reason."""
    features: tuple[Scores, Scores]
    """All that was computed of each document without knowing of its membership, [n, f] and [m, f]: to learn from."""


def names_of(*kinds: Kind) -> tuple[str, ...]:
    """Return the attacks of some kinds; all of them, if none is given."""
    return tuple(name for name, made in ATTACKS.items() if not kinds or made.kind in kinds)


def default_attacks() -> tuple[str, ...]:
    """Return every attack for which one pass of each model is enough."""
    return names_of("single_pass", "knows_defence")


def require_attacks(names: Sequence[str]) -> None:
    """Raise ValueError for a name that no attack has, with the nearest one."""
    for name in names:
        if name not in ATTACKS:
            raise ValueError(f"no attack is called {name!r}{did_you_mean(name, ATTACKS)}")


def attack_scores(
    targets: tuple[Signals, Signals], contexts: tuple[AttackContext, AttackContext], names: Sequence[str], seed: int
) -> Scored:
    """Run some attacks on the members' and non-members' signals of a model.

    Args:
        targets: signals of the members and of the non-members.
        contexts: what the attacker has beside them.
        names: the attacks; those that cannot be run are named with the reason.
        seed: of what attacks draw.
    """
    available = contexts[0].has & contexts[1].has
    enough = min(target.n_documents for target in targets)
    found: dict[str, PairOfScores] = {}
    not_run: dict[str, str] = {}
    on_features: list[str] = []
    for name in names:
        made = ATTACKS[name]
        missing = made.needs - available
        if missing:
            reasons = [contexts[0].missing_reruns.get(need, need) for need in sorted(missing)]
            not_run[made.label] = f"needs {' and '.join(dict.fromkeys(reasons))}"
        elif made.of_document is not None:
            found[name] = made(targets[0], contexts[0]), made(targets[1], contexts[1])
        elif enough < made.fewest:
            not_run[made.label] = f"needs {made.fewest} members and non-members to learn from"
        else:
            on_features.append(name)
    blocks = [
        np.stack([pair[side] for pair in found.values()] or [np.zeros(targets[side].n_documents)], axis=1)
        for side in (0, 1)
    ]
    if "reference" in available:
        spread = [
            features(target, context.reference_for(target)) for target, context in zip(targets, contexts, strict=True)
        ]
        found |= scores_of(spread[0], spread[1], seed, on_features)
        blocks = [np.concatenate(pair, axis=1) for pair in zip(blocks, spread, strict=True)]
    ordered: dict[str, PairOfScores] = {name: found[name] for name in names if name in found}
    return Scored(scores=ordered, not_run=not_run, features=(blocks[0], blocks[1]))
