"""What an audit found beside its attacks, as data: power, references, regurgitation, groups, the gate's verdict."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dualtok.audit.report.base import Count, Estimate, Record, Share

Verdict = Literal["passed", "above", "cannot be said"]
Compared = Literal["value", "low", "high"]


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
    """Of its documents against the non-members; the interval is corrected for choosing the group and the attack."""
    p_value: Share
    """Against random groups of the same sizes."""


class GroupAudit(Record):
    """What attacks find when all documents of a group count as one."""

    field: str
    """Field of the documents that names the group."""
    member_groups: Count
    non_member_groups: Count
    strongest_label: str
    strongest: Estimate
    """Two-sided AUC of the strongest attack on whole groups; the interval is corrected for the number of attacks."""
    worst: Group
    """The group that is told from the non-members best."""


class GateCheck(Record):
    """One threshold, and what was measured."""

    model: str
    figure: str
    """E.g. "strongest AUC" or "TPR at 1 % FPR"."""
    limit: float
    value: float | None
    """The figure that was compared, by default the upper end of an interval; None if it cannot be said."""
    verdict: Verdict
    reason: str = ""
    """Why it cannot be said, or what is to be known about the comparison."""
    compared: Compared = "high"
    """Whether ``value`` is the figure itself or an end of its interval."""


class GateVerdict(Record):
    """What a gate said of a report."""

    verdict: Verdict
    """The worst of the checks: one above its limit counts first, then one of which it cannot be said."""
    checks: list[GateCheck] = Field(default_factory=list)
    compare: Compared = "high"
    """What was asked to be compared."""
    left_out: dict[str, str] = Field(default_factory=dict)
    """Model that no limit was put on -> why."""
