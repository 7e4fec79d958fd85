"""What attacks find when all documents of a group, for instance of one person, count as one.

Two questions. **Whole groups:** can members be told from non-members by all their documents together? A group's score
is the mean of its documents' scores, in standard deviations that such a mean has among non-members: mean x
sqrt(k / (1 + (k - 1) rho)) for k documents (:mod:`.group_scores`), so that large and small groups are on one scale.
**The worst group:** whom does the model give away most? It is the member group whose documents differ most from all
non-members' in these standard deviations, in any attack, to either side. The largest AUC would be no measure: the
smallest groups have the most extreme ones by chance.

Random groups stand for the null hypothesis: all documents are dealt anew to groups of the same sizes, and the largest
deviation of any such group in any attack is noted. That corrects for choosing the group and the attack, whatever the
attacks have in common. Documents dealt at random are independent, those of a person are not: a person with a style of
their own would stand out of every model. So the deviation of a real group is divided by what the likeness of a group's
documents makes of it, and by how much the most unusual non-member group exceeds random groups.

What remains is an assumption: apart from membership, persons differ about normally. No test can do without one, for by
ranks alone the most unusual of 50 persons is never unusual enough beside 50 others. In simulated audits of 60 groups of
2 to 11 documents by six attacks, where a person explained a fifth of a score's variance and nobody was a member, 4 of
150 found a worst group at p <= .05; where the persons' effects had heavy tails (Student's t with 5 degrees of freedom,
80 groups), 17 of 150 did.

Attacks that learned on some of the documents (cross-fitted) are left out: having read one document of a person they
know the next, whether the model does or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.base import attack_of
from dualtok.audit.report.base import Estimate
from dualtok.audit.report.details import Group, GroupAudit
from dualtok.audit.statistics.checks import strongest_p_value
from dualtok.audit.statistics.group_scores import Side, auc_interval, design_effect, likeness, normal_scores, side_of
from dualtok.audit.statistics.metrics import bootstrap_interval, roc_auc, two_sided, two_sided_interval
from dualtok.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from dualtok.audit.attacks.base import PairOfScores
    from dualtok.audit.settings import AuditConfig

    Floats = NDArray[np.float64]

FEWEST_GROUPS = 5
"""Member groups, and non-member groups, below which nothing can be said."""
MOST_CELLS = 10**9
"""Scores that are dealt to random groups at most; with more documents and attacks there are fewer random draws."""
FEWEST_DRAWS = 199
TINY = 1e-12


@dataclass(frozen=True)
class DocumentGroups:
    """Whose each document is."""

    members: Mapping[int, str]
    """Id of a member -> its group; documents without one are not there."""
    non_members: Mapping[int, str]
    name_of: Callable[[str], str]
    """Group -> what the report calls it."""

    def audit(
        self,
        scores: Mapping[str, PairOfScores],
        documents: tuple[NDArray[np.int64], NDArray[np.int64]],
        config: AuditConfig,
    ) -> GroupAudit | None:
        """Return :func:`audit_groups` of the members and non-members with these ids, in the order of their scores."""
        sides = [
            [known.get(int(document)) for document in ids]
            for known, ids in zip((self.members, self.non_members), documents, strict=True)
        ]
        return audit_groups(scores, sides[0], sides[1], name_of=self.name_of, config=config)


def require_groups(
    members: Sequence[str | None], non_members: Sequence[str | None], *, field: str, min_documents: int
) -> tuple[Side, Side]:
    """Return the groups of both sides.

    Args:
        members: group of each member, None for a document without one.
        non_members: likewise.
        field: what names the groups, for errors.
        min_documents: of a group.

    Raises:
        DataError: a group is on both sides, or there are fewer than :data:`FEWEST_GROUPS` groups on one. Of a person
            with documents on both sides the non-members' were not read in training and yet are not those of someone
            whom the model does not know; to leave them out would change, silently, whom the audit is about.
    """
    both = {name for name in members if name is not None} & {name for name in non_members if name is not None}
    if both:
        raise DataError(
            f"audit.group_field: {len(both)} groups of {field!r} have documents among the members and among the "
            "non-members, so that no figure by group means anything; put all documents of a group on one side "
            "(`dualtok prepare` does so with data.group_field), or remove audit.group_field"
        )
    sides = side_of(members, min_documents), side_of(non_members, min_documents)
    for side, kind in zip(sides, ("members", "non-members"), strict=True):
        if len(side.sizes) < FEWEST_GROUPS:
            raise DataError(
                f"audit.group_field: the {kind} have {len(side.sizes)} groups of {field!r} with {min_documents} "
                f"documents or more, and {FEWEST_GROUPS} are needed; give more, lower audit.min_group_documents, or "
                "remove audit.group_field"
            )
    return sides


def audit_groups(
    scores: Mapping[str, PairOfScores],
    members: Sequence[str | None],
    non_members: Sequence[str | None],
    *,
    name_of: Callable[[str], str],
    config: AuditConfig,
) -> GroupAudit | None:
    """Return what attacks find in whole groups, and the worst group.

    Args:
        scores: attack -> scores of members [n] and non-members [m], higher = member.
        members: group of each member [n], None for a document without one: it is no group by itself.
        non_members: likewise [m].
        name_of: group -> what the report calls it.
        config: its ``group_field``, ``min_group_documents``, ``confidence``, ``bootstrap_resamples``, ``permutations``
            and ``seed``.

    Returns:
        The figures; None if every attack learned on the documents.

    Raises:
        DataError: as :func:`require_groups`.
    """
    field = str(config.group_field)
    sides = require_groups(members, non_members, field=field, min_documents=config.min_group_documents)
    fixed = {name: pair for name, pair in scores.items() if attack_of(name).widening == 1.0}
    if not fixed:
        return None
    pairs = fixed.values()
    z = normal_scores(np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs]))
    judged = _Judged.of(z, sides)
    label, strongest, p_value = _whole_groups(list(fixed), judged, config)
    return GroupAudit(
        field=field,
        min_documents=config.min_group_documents,
        attacks=len(fixed),
        member_groups=len(sides[0].sizes),
        non_member_groups=len(sides[1].sizes),
        members_without_group=sides[0].without_group,
        non_members_without_group=sides[1].without_group,
        small_member_groups=sides[0].small_groups,
        small_non_member_groups=sides[1].small_groups,
        strongest_label=label,
        strongest=strongest,
        strongest_p_value=p_value,
        worst=_worst(fixed, judged, name_of, config),
    )


@dataclass(frozen=True, eq=False)
class _Judged:
    """Normal scores, and the groups' means among them."""

    z: Floats
    """Of all documents [a, n + m], members first."""
    members: Side
    non_members: Side
    rho: Floats
    """Likeness of a group's documents [a]."""
    means: tuple[Floats, Floats]
    """Of the groups of either side, as deviations from the non-members' mean, in their standard deviations [a, g]."""

    @classmethod
    def of(cls, z: Floats, sides: tuple[Side, Side]) -> _Judged:
        members, non_members = sides
        n = members.documents
        grouped = z[:, members.rows], z[:, n + non_members.rows]
        center, spread = _moments(z[:, n:])
        means = [
            (side.sums(own) / side.sizes - center) / spread
            for side, own in zip((members, non_members), grouped, strict=True)
        ]
        return cls(
            z,
            members,
            non_members,
            likeness(list(zip(grouped, (members, non_members), strict=True))),
            (means[0], means[1]),
        )

    @property
    def non_members_worth(self) -> Floats:
        """Return how many independent documents the non-members are worth [a]."""
        m, squares = self.non_members.documents, float((self.non_members.sizes**2).sum())
        singles = m - len(self.non_members.rows)
        return np.asarray(m / (1 + ((squares + singles) / m - 1) * self.rho))


def _moments(z: Floats) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of each attack's scores [a, 1]; scores that are all equal have infinite."""
    spread = z.std(axis=1, ddof=1, keepdims=True)
    return z.mean(axis=1, keepdims=True), np.where(spread > TINY, spread, np.inf)


def _whole_groups(names: list[str], judged: _Judged, config: AuditConfig) -> tuple[str, Estimate, float]:
    """Return the strongest attack on whole groups, its two-sided AUC, and the p-value by permuting groups' labels."""
    standardized = [
        means * np.sqrt(side.sizes / design_effect(side.sizes, judged.rho))
        for means, side in zip(judged.means, (judged.members, judged.non_members), strict=True)
    ]
    scores = {name: (standardized[0][row], standardized[1][row]) for row, name in enumerate(names)}
    confidence = 1 - (1 - config.confidence) / len(names)
    found = {}
    for name, pair in scores.items():
        auc = roc_auc(*pair)
        ends = bootstrap_interval(*pair, resamples=config.bootstrap_resamples, confidence=confidence, seed=config.seed)
        # The bootstrap of few groups is too narrow, and has no width where they are separated completely.
        others = auc_interval(auc, len(pair[0]), len(pair[1]), confidence)
        low, high = two_sided_interval(min(ends[0], others[0]), max(ends[1], others[1]))
        found[name] = Estimate(value=two_sided(auc), low=low, high=high)
    best = max(found, key=lambda name: found[name].value)
    low, high = max(one.low for one in found.values()), max(one.high for one in found.values())
    strongest = Estimate(value=found[best].value, low=low, high=high)
    p_value = strongest_p_value(scores, permutations=config.permutations, seed=config.seed)
    return attack_of(best).label, strongest, p_value


def _worst(
    scores: Mapping[str, PairOfScores], judged: _Judged, name_of: Callable[[str], str], config: AuditConfig
) -> Group:
    """Return the member group that differs most from the non-members."""
    members, n = judged.members, judged.members.documents
    design = design_effect(members.sizes, judged.rho)
    excess = _excess(judged, config)
    errors = np.sqrt(design / members.sizes + 1 / judged.non_members_worth[:, None])
    deviation = np.abs(judged.means[0]) / errors / excess
    row, group = np.unravel_index(deviation.argmax(), deviation.shape)
    among_members = _among(judged.z[:, :n], judged.z[:, members.rows], members, design)[row, group] / excess

    name, size = list(scores)[row], int(members.sizes[group])
    start = int(members.sizes[:group].sum())
    own = scores[name][0][members.rows[start : start + size]]
    auc = roc_auc(own, scores[name][1])
    confidence = 1 - (1 - config.confidence) / deviation.size
    worth = size / float(design[row, group]), float(judged.non_members_worth[row])
    low, high = two_sided_interval(*auc_interval(auc, *worth, confidence))
    return Group(
        name=name_of(members.names[group]),
        documents=size,
        label=attack_of(name).label,
        auc=Estimate(value=two_sided(auc), low=low, high=high),
        p_value=_p_value(deviation[row, group], _random_groups(judged.z, members, config)),
        p_value_among_members=_p_value(among_members, _random_groups(judged.z[:, :n], members, config)),
    )


def _among(z: Floats, grouped: Floats, side: Side, design: Floats) -> Floats:
    """Return how far each group's mean lies from that of its whole side, in standard errors [a, g].

    Args:
        z: scores of the side's documents [a, n].
        grouped: of those in groups, group after group.
        side: the groups.
        design: their design effects [a, g].
    """
    center, spread = _moments(z)
    means = (side.sums(grouped) / side.sizes - center) / spread
    return np.asarray(np.abs(means) / np.sqrt(design / side.sizes - 1 / z.shape[1]))


def _excess(judged: _Judged, config: AuditConfig) -> float:
    """Return by how much the most unusual non-member group exceeds what random groups give in half of the cases.

    At least 1. Where some persons are far from the others without any model's doing, the most unusual non-member shows
    it, and members must be so much more unusual.
    """
    n, side = judged.members.documents, judged.non_members
    z = judged.z[:, n:]
    found = _among(z, z[:, side.rows], side, design_effect(side.sizes, judged.rho)).max()
    return max(1.0, float(found / max(TINY, np.median(_random_groups(z, side, config)))))


def _p_value(found: float, by_chance: Floats) -> float:
    return (1 + int(np.count_nonzero(by_chance >= found - TINY))) / (1 + len(by_chance))


def _random_groups(z: Floats, side: Side, config: AuditConfig) -> Floats:
    """Return the largest deviation of random groups of the members' sizes, in any attack, per draw.

    Args:
        z: scores of the documents that are dealt to groups [a, d]: of all, where what is left over stands for the
            non-members, or of the members alone, where a group is compared with all of them.
        members: the groups, and how many members there are.
        config: its ``permutations`` and ``seed``.
    """
    total, n, sizes = z.shape[1], side.documents, side.sizes
    rng = np.random.default_rng(config.seed)
    largest = []
    for _ in range(min(config.permutations, max(FEWEST_DRAWS, MOST_CELLS // z.size))):
        dealt = z[:, rng.permutation(total)]
        rest = dealt[:, n:] if total > n else dealt
        center, spread = _moments(rest)
        other = 1 / rest.shape[1] if total > n else -1 / n
        means = side.sums(dealt[:, : len(side.rows)]) / sizes
        largest.append(np.abs((means - center) / spread / np.sqrt(1 / sizes + other)).max())
    return np.array(largest)
