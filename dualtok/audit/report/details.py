"""What an audit found beside its attacks, as data: power, references, regurgitation, groups, the gate's verdict."""

from __future__ import annotations

from typing import Annotated, Literal

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


class RunLengths(Record):
    """How many tokens in a row of a document a model gives back, over several documents."""

    median: float
    largest: Count


class WithinBits(Record):
    """Share of the documents that have a passage which an attacker can get at within a budget."""

    bits: Annotated[float, Field(ge=0)]
    """The budget: 2 to its power is the expected number of queries. At 0 greedy decoding gives the passage back."""
    members: Estimate | None
    """Of the documents with so many tokens in a row; None if there are none."""
    non_members: Estimate | None


class LengthCost(Record):
    """What passages of one length cost an attacker: (l, b)-inextractability (Liu et al. 2026, arXiv 2604.18697)."""

    length: Count
    """l, in tokens."""
    n_members: Count
    """Members with so many predicted tokens in a row."""
    n_non_members: Count
    bits_members: float | None
    """b: bits of the cheapest passage of all members; None if there is no passage of this length."""
    bits_non_members: float | None
    greedy_windows_members: Share | None
    """Share of all passages of this length that greedy decoding gives back."""
    greedy_windows_non_members: Share | None
    within: list[WithinBits]


class Continuation(Record):
    """What a model wrote after the beginning of one document, by greedy decoding."""

    document: Count
    verbatim: Count
    """Tokens from the first on that are the document's own."""
    common: Count
    """Tokens of the longest run that the model's text and the document's share, wherever it is."""


class Continuations(Record):
    """What a model writes after the beginnings of documents, by greedy decoding, on a sample of each class."""

    prefix: Count
    """Tokens of a document that the model was given."""
    tokens: Count
    """Tokens that it then wrote, and that the document has as well."""
    members: list[Continuation]
    non_members: list[Continuation]
    whole_members: Estimate
    """Share of the sample given back word for word, with its exact interval."""
    whole_non_members: Estimate
    runs_members: RunLengths
    """Of ``common``."""
    runs_non_members: RunLengths


class Regurgitation(Record):
    """How much of documents a model gives back word for word, members against non-members."""

    length: Count
    """Tokens that must come back in a row to count as extracted."""
    extracted_members: Estimate
    """Share of the members, of those with so many tokens in a row, of which greedy decoding gives back a passage of
    ``length`` tokens after its true prefix; the interval is exact."""
    extracted_non_members: Estimate
    greedy_members: Share = 0.0
    """Share of the members' tokens that are the likeliest after what is before them."""
    greedy_non_members: Share = 0.0
    runs_members: RunLengths | None = None
    """Of each document's most tokens in a row that are all the likeliest."""
    runs_non_members: RunLengths | None = None
    costs: list[LengthCost] = Field(default_factory=list)
    """By length, ascending."""
    continuations: Continuations | None = None
    """None without ``audit.extract``."""


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
