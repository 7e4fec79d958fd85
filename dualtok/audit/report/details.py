"""What an audit found beside its attacks, as data: power, references, regurgitation, groups, the gate's verdict."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dualtok.audit.report.base import Count, Estimate, Record, Share


class Power(Record):
    """The smallest leak that an audit of so many documents would have seen."""

    auc: Share
    """Smallest two-sided AUC of one attack that lifts the strongest attack's interval above .5 with ``probability``."""
    probability: Share
    simulations: Count


class AttackReference(Record):
    """One of the attacker's reference models, and how strong it is."""

    name: str
    perplexity_members: float
    perplexity_non_members: float


class Regurgitation(Record):
    """How much of documents a model gives back word for word, members against non-members."""

    length: Count
    """Tokens that must come back in a row to count as extracted."""
    extracted_members: Estimate
    """Share of the members of which greedy decoding gives back a passage of ``length`` tokens after a prefix."""
    extracted_non_members: Estimate


class Group(Record):
    """All documents of one group, e.g. of one person."""

    name: str
    """Its name, or a hash of it where names are not to be shown."""
    documents: Count
    label: str
    """The attack that tells most about it."""
    auc: Estimate
    """Two-sided, of its documents against the non-members; the interval is corrected for choosing the group and the
    attack, and counts that the documents of a group are alike."""
    p_value: Share
    """Against random groups of the same sizes, of members and non-members: is it told from non-members?"""
    p_value_among_members: Share
    """Against random groups of the same sizes, of members: is it told better than other members?"""


class GroupAudit(Record):
    """What attacks find when all documents of a group count as one."""

    field: str
    """Field of the documents that names the group."""
    min_documents: Count
    """Documents of the smallest groups that were looked at."""
    attacks: Count
    """Attacks that were run, and that the figures are corrected for; those that learn on the documents are not."""
    member_groups: Count
    non_member_groups: Count
    members_without_group: Count
    """Members for which the field is empty: they are no group."""
    non_members_without_group: Count
    small_member_groups: Count
    """Groups left out for having fewer than ``min_documents``."""
    small_non_member_groups: Count
    strongest_label: str
    strongest: Estimate
    """Two-sided AUC of the strongest attack on whole groups; the interval is corrected for the number of attacks."""
    strongest_p_value: Share
    """Of that, by permuting the labels of groups in all attacks alike."""
    worst: Group
    """The group that is told from the non-members best."""


class GateCheck(Record):
    """One threshold, and what was measured."""

    model: str
    figure: str
    """E.g. "strongest AUC" or "TPR at 1 %"."""
    limit: float
    value: float | None
    """The figure that was compared, by default the upper end of an interval; None if it cannot be said."""
    verdict: Literal["passed", "above", "cannot be said"]
    reason: str = ""


class GateVerdict(Record):
    """What a gate said of a report."""

    verdict: Literal["passed", "above", "cannot be said"]
    checks: list[GateCheck] = Field(default_factory=list)
