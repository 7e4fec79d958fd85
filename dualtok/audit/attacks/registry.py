"""All attacks of the registry, and how they are run on one model at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.adaptive import features, scores_of
from dualtok.audit.attacks.base import ATTACKS, attack_of, takes_references
from dualtok.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualtok.audit.attacks.base import AttackContext, Kind, PairOfScores, Scores
    from dualtok.audit.signals.signals import Signals


__all__ = ["ATTACKS", "Scored", "attack_of", "attack_scores", "default_attacks", "names_of", "require_attacks"]


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


@dataclass(frozen=True)
class Judged:
    """What attacks find in documents of one class, each document by itself; parts of a class can be joined."""

    scores: dict[str, Scores]
    """Name of an attack -> scores [n], higher = member."""
    features: Scores | None
    """:func:`.adaptive.features` [n, f]; None without the attacker's reference."""
    further: dict[str, Scores] = field(default_factory=dict)
    """Name of each further reference of the attacker's -> the features with it [n, f]."""

    @classmethod
    def joined(cls, parts: Sequence[Judged]) -> Judged:
        """Return several parts' documents as one; all must have been judged by the same attacks."""
        if len(parts) == 1:
            return parts[0]
        scores = {name: np.concatenate([part.scores[name] for part in parts]) for name in parts[0].scores}
        blocks = [part.features for part in parts if part.features is not None]
        further = {name: np.concatenate([part.further[name] for part in parts]) for name in parts[0].further}
        return cls(scores, np.concatenate(blocks) if blocks else None, further)


def judge(target: Signals, context: AttackContext, names: Sequence[str]) -> Judged:
    """Return what the attacks that judge documents one by one find, of those that the context suffices for.

    Args:
        target: signals of documents of one class, each with a predicted token.
        context: what the attacker has beside them.
        names: the attacks; others of them, that compare documents, are run by :func:`compare`.
    """
    scores = {}
    for name in names:
        made = ATTACKS[name]
        if made.of_document is not None and made.needs <= context.has:
            scores[name] = made(target, context)
    with_reference = "reference" in context.has
    own = features(target, context.reference_for(target)) if with_reference else None
    further = {}
    for reference, signals in context.further_references.items():
        other = replace(context, reference=signals)
        further[reference] = features(target, other.reference_for(target))
        for name in names:
            made = ATTACKS[name]
            if made.of_document is not None and takes_references(made) and made.needs <= other.has:
                scores[f"{name}@{reference}"] = made(target, other)
    return Judged(scores, own, further)


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
    usable = tuple(name for name in names if ATTACKS[name].needs <= contexts[0].has & contexts[1].has)
    judged = [judge(target, context, usable) for target, context in zip(targets, contexts, strict=True)]
    sizes = min(target.n_documents for target in targets)
    return compare((judged[0], judged[1]), contexts, names, seed, enough=sizes)


def compare(
    judged: tuple[Judged, Judged],
    contexts: tuple[AttackContext, AttackContext],
    names: Sequence[str],
    seed: int,
    *,
    enough: int,
) -> Scored:
    """Run the attacks that compare documents, and put all scores together.

    Args:
        judged: what :func:`judge` found of the members and of the non-members.
        contexts: what the attacker had beside their signals; of a class in parts, of any part.
        names: the attacks; those that cannot be run are named with the reason.
        seed: of what attacks draw.
        enough: documents of the smaller class.
    """
    available = contexts[0].has & contexts[1].has
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
            found[name] = judged[0].scores[name], judged[1].scores[name]
        elif enough < made.fewest:
            not_run[made.label] = f"needs {made.fewest} members and non-members to learn from"
        else:
            on_features.append(name)
    blocks = [_columns([pair[side] for pair in found.values()], judged[side]) for side in (0, 1)]
    members, non_members = judged[0].features, judged[1].features
    if members is not None and non_members is not None:
        found |= scores_of(members, non_members, seed, on_features)
        blocks = [np.concatenate(pair, axis=1) for pair in zip(blocks, (members, non_members), strict=True)]
    ordered: dict[str, PairOfScores] = {name: found[name] for name in names if name in found}
    for reference, first in judged[0].further.items():
        again = [name for name in on_features if takes_references(ATTACKS[name])]
        learned = scores_of(first, judged[1].further[reference], seed, again)
        for name in names:
            score = f"{name}@{reference}"
            if name in learned:
                ordered[score] = learned[name]
            elif score in judged[0].scores:
                ordered[score] = judged[0].scores[score], judged[1].scores[score]
    return Scored(scores=ordered, not_run=not_run, features=(blocks[0], blocks[1]))


def _columns(scores: Sequence[Scores], judged: Judged) -> Scores:
    """Return scores side by side [n, f]; one column of zeros where there are none."""
    if scores:
        return np.stack(scores, axis=1)
    return np.zeros((0 if judged.features is None else len(judged.features), 1))
