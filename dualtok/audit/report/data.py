"""What an audit found, as data: read and written as JSON, and the only input of the report."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from dualtok.audit.report.base import Count, Estimate, Record, Share
from dualtok.audit.report.details import AttackReference, GateVerdict, GroupAudit, Power, Regurgitation
from dualtok.audit.report.old_names import with_new_names
from dualtok.audit.settings import AuditConfig

REPORT_FORMAT: Final = "dualtok-report/1"
"""Name and version of the format of ``report.json``; ``docs/schema`` has a JSON schema of each. A field that is added,
renamed or removed after a release makes a new version."""


class TprAtFpr(Record):
    """The true-positive rate at one target false-positive rate, or why there is none."""

    target_fpr: Share
    tpr: Estimate | None = None
    attained_fpr: Share | None = None
    note: str = ""


class RocPoints(Record):
    """A thinned ROC curve."""

    fpr: list[Share]
    tpr: list[Share]


class AttackResult(Record):
    """One attack on one model."""

    name: str
    label: str
    auc: Estimate
    """Area under the ROC curve, one-sided: above 0.5 the attack works as published."""
    auc_two_sided: Estimate
    """max(AUC, 1 - AUC); its interval is derived from the one-sided one."""
    tpr: list[TprAtFpr]
    roc: RocPoints


class Strongest(Record):
    """The best of several attacks, each also with its sign flipped."""

    label: str
    auc_two_sided: Estimate
    """The interval holds for the maximum over all attacks (Bonferroni)."""


class StrongestTpr(Record):
    """The best true-positive rate of several attacks, as published, at one false-positive rate."""

    target_fpr: Share
    label: str
    tpr: Estimate
    """The interval holds for the maximum over all attacks (Bonferroni)."""


class Collections(Record):
    """Whether collections of members can be told from collections of non-members by one score."""

    label: str
    """The score."""
    size: Count
    """Documents in a collection."""
    p_value: Share
    """Two-sided permutation p-value of one collection, drawn with ``audit.seed``."""
    p_holm: Share
    """The same, holding for all collections of the model together (Holm 1979)."""
    collections: Count
    """Disjoint collections that there are documents for."""
    rejected: Share
    """Share of them with a p-value of at most .05; about .05 where nothing is given away."""
    rejected_low: Share
    """Lower end of that share's exact 95 % interval."""
    rejected_high: Share


class CanaryScore(Record):
    """How well a score tells included canaries from those left out."""

    label: str
    auc: Estimate | None
    """One-sided; None if all coins fell alike."""


BoundMethod = Literal["steinke", "f_dp", "f_dp_gaussian", "independent_gaussian"]
"""How a lower bound on epsilon is computed from the guesses: :mod:`dualtok.audit.canaries.bounds`."""


class EpsilonBound(Record):
    """What epsilon the guesses about the canaries refute."""

    method: BoundMethod = "steinke"
    delta: Share
    epsilon: Annotated[float, Field(ge=0)]
    """Lower bound that holds with ``audit.confidence`` if what the method assumes is so; 0 if nothing is refuted."""
    mu: Annotated[float, Field(ge=0)] | None = None
    """Lower bound on mu, from which epsilon follows; None for methods that assume no Gaussian mechanism."""
    label: str
    """The score that gave the best bound."""
    guesses: Count
    """Coins that were guessed."""
    correct: Count
    tests: Count
    """Scores times numbers of guesses, for which the bound is corrected."""


class Exposures(Record):
    """Exposure of each canary, in bits."""

    included: list[float]
    excluded: list[float]


class CanaryAudit(Record):
    """What a model gives away of canaries, each of which a fair coin included in its training data."""

    n_included: Count
    n_excluded: Count
    kind: str = ""
    """``data.canaries.kind``; empty in the figures of an earlier version."""
    scores: list[CanaryScore]
    epsilon: list[EpsilonBound]
    """The bound that was chosen in advance (Steinke, Nasr and Jagielski 2023), one per delta."""
    other_bounds: list[EpsilonBound] = Field(default_factory=list)
    """Other methods' bounds on the same coins, one per method and delta. Each holds with ``audit.confidence`` by
    itself, under its assumptions; the largest of several does not."""
    space_bits: float
    """log2 of the number of secrets that each was drawn from: the largest exposure; 0 if canaries have no secret."""
    candidates: Count
    """Secrets that each was ranked among, without its own; 0 if canaries have no secret to rank."""
    ranked: Exposures
    """By rank, at most log2(candidates + 1); empty if canaries have no secret to rank."""
    extrapolated: Exposures
    """By a fit to the candidates' losses, at most ``space_bits``; empty if canaries have no secret to rank."""
    extracted_included: Estimate | None
    """Share of the secrets that greedy decoding gives back after their prefix, with its exact interval; None if there
    is no secret, or no such canary."""
    extracted_excluded: Estimate | None


class NullModel(Record):
    """What the attacks found in a model that saw no member."""

    name: str
    strongest: Strongest
    p_value: Share | None
    """Of the strongest attack; small ones mean that members and non-members differ by themselves."""


class Checks(Record):
    """What must not be found if members and non-members are one distribution."""

    blind_auc: Estimate | None
    """AUC of a bag of words, which saw no model, with its 99 % interval; None with too few documents to learn from."""
    null_model: NullModel | None = None
    """Of ``audit.null_model``; None if no such model was named."""
    duplicates: Share
    """Share of the non-members that are a member, token by token."""
    near_duplicates: Share | None = None
    """Share of the non-members whose runs of 5 tokens are at least .8 alike (Jaccard) to a member's; None in figures of
    an earlier version."""
    shared_passages: Share
    """Share of the non-members that share a passage of about 200 characters with a member."""
    warnings: list[str] = Field(default_factory=list)
    """What makes the audit's figures doubtful; empty if nothing does."""
    unproven: dict[str, str] = Field(default_factory=dict)
    """Model -> why nothing shows that it was trained on the members; else it may be one that never saw them."""
    void: bool = False
    """Whether no attack's figure means anything, because members and non-members differ or overlap by themselves."""


class TokenHistogram(Record):
    """How s(t) = CE(theta; t) - CE(theta_ref; t) is distributed; the outer bins hold all that lies beyond."""

    edges: list[float]
    members: list[Count]
    non_members: list[Count]
    mean_members: float
    mean_non_members: float

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not len(self.members) == len(self.non_members) == len(self.edges) - 1:
            raise ValueError("a histogram needs one count per bin and class, and one edge more than bins")
        return self


class ModelAudit(Record):
    """All figures of one model: one row of the report's tables."""

    name: str
    step: int | None = None
    n_members: Count
    n_non_members: Count
    members_left_out: Count = 0
    """Members without a predicted token (a single token long), which no attack can score."""
    non_members_left_out: Count = 0
    perplexity_members: float
    perplexity_non_members: float
    loss_gap: float
    """Non-members' mean loss minus members', each a mean over tokens, in nats per token."""
    attacks: list[AttackResult]
    not_run: dict[str, str] = Field(default_factory=dict)
    """Label of an attack -> why it was not run."""
    strongest: Strongest
    strongest_p_value: Share | None = None
    """Of the largest |AUC - 1/2| of all attacks, by permuting the labels of documents in all attacks alike."""
    collections: list[Collections] = Field(default_factory=list)
    calibrated: TokenHistogram | None = None
    strongest_tpr: list[StrongestTpr] = Field(default_factory=list)
    """One per false-positive rate that can be measured."""
    power: Power | None = None
    """The smallest leak that this audit would have seen; None in the figures of an earlier version."""
    canaries: CanaryAudit | None = None
    """None if the data was prepared without canaries."""
    regurgitation: Regurgitation | None = None
    """None in the figures of an earlier version."""
    groups: GroupAudit | None = None
    """None if no group field was named."""

    def attack(self, name: str) -> AttackResult | None:
        """Return the result of the attack with this name, or None if it was not run."""
        return next((attack for attack in self.attacks if attack.name == name), None)

    def collection(self, label: str, size: int) -> Collections | None:
        """Return the test of collections of so many documents by this score, or None if there was none."""
        return next((test for test in self.collections if (test.label, test.size) == (label, size)), None)


class AuditFigures(Record):
    """What an audit measured, and the settings it was measured with."""

    settings: AuditConfig
    models: list[ModelAudit]
    checks: Checks | None = None
    references: list[AttackReference] = Field(default_factory=list)
    """The attacker's reference models; empty if there are none, or in the figures of an earlier version."""
    prefix_documents: dict[str, list[int]] = Field(default_factory=dict)
    """Split -> documents that attacks put in front of others, and that the audit is therefore not about."""
    hashes: dict[str, str] = Field(default_factory=dict)
    """What was audited ("data", "code" or a model) -> its SHA-256 as hex digits; empty before version 0.3."""

    @model_validator(mode="before")
    @classmethod
    def _names(cls, content: Any) -> Any:
        return with_new_names(content)


class SelectionSeries(Record):
    """Shares of a run's tokens that were learned and unlearned, over its training steps."""

    run: str
    steps: list[int]
    hard: list[Share]
    memorized: list[Share]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not len(self.steps) == len(self.hard) == len(self.memorized):
            raise ValueError(f"selection of {self.run!r}: {len(self.steps)} steps need as many shares of each kind")
        if any(h + m > 1 + 1e-6 for h, m in zip(self.hard, self.memorized, strict=True)):
            raise ValueError(f"selection of {self.run!r}: the hard and memorized shares exceed 1 together")
        return self

    @property
    def neutral(self) -> list[float]:
        """Share of tokens that took no part, per step."""
        return [max(0.0, 1 - hard - memorized) for hard, memorized in zip(self.hard, self.memorized, strict=True)]


class TrainingSeries(Record):
    """One figure of a run over its training steps."""

    run: str
    figure: Literal["loss_gap", "ref_auc"]
    """``loss_gap`` in nats per token, or ``ref_auc``, the one-sided AUC of the Ref attack."""
    steps: list[int]
    values: list[float]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.steps) != len(self.values):
            raise ValueError(f"{self.figure} of {self.run!r}: {len(self.steps)} steps, {len(self.values)} values")
        return self


class AuditReport(Record):
    """Everything that ``report.html``, ``report.json`` and ``report.csv`` are made of."""

    format: Literal["dualtok-report/1"] = REPORT_FORMAT
    """Of the file; reports without it are of version 0.2.0 or earlier."""
    title: str
    created: str
    """Time of the audit, ISO 8601 with its offset."""
    identity: dict[str, str] = Field(default_factory=dict)
    """What was audited, e.g. {"data": "...", "members": "split train", "seed": "0"}; shown in the header."""
    settings: AuditConfig = Field(default_factory=AuditConfig)
    rows: list[ModelAudit]
    checks: Checks | None = None
    references: list[AttackReference] = Field(default_factory=list)
    """The attacker's reference models."""
    gate: GateVerdict | None = None
    """What ``dualtok gate`` said of this report; None if it was not asked."""
    selection: list[SelectionSeries] = Field(default_factory=list)
    training: list[TrainingSeries] = Field(default_factory=list)
    configs: dict[str, str] = Field(default_factory=dict)
    """Name of a run -> its configuration as YAML text."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Name of a package -> its version."""
    hashes: dict[str, str] = Field(default_factory=dict)
    """What was audited ("data", "code" or a model) -> its SHA-256 as hex digits."""

    @model_validator(mode="before")
    @classmethod
    def _names(cls, content: Any) -> Any:
        found = content.get("format", REPORT_FORMAT) if isinstance(content, dict) else REPORT_FORMAT
        if found != REPORT_FORMAT:
            raise ValueError(f"its format is {found!r}, this version of dualtok reads {REPORT_FORMAT!r}")
        return with_new_names(content)

    @model_validator(mode="after")
    def _rows_differ(self) -> Self:
        names = [row.name for row in self.rows]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a report needs rows with distinct names, got {names}")
        return self
