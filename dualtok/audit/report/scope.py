"""What a report's figures are about: who attacked with what, what was not tested, and which requirement they answer.

Pure functions of the report's records.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dualtok.audit.attacks.base import ATTACKS
from dualtok.audit.report.tables import attack_columns, perplexity
from dualtok.audit.report.verdict import FALSE_ALARMS, percent, tpr_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualtok.audit.report.data import AuditReport, ModelAudit

CLEARLY_WORSE = 1.25
"""Factor between a reference's and a model's perplexity on the non-members above which the reference is called weak."""
NOT_ASKED = "not asked for: name it in audit.attacks"
KNOWLEDGE = {
    "single_pass": (
        "One run of the model",
        "the document and the probability that the model gives to each of its tokens; some also use a reference model, "
        "or how often tokens occur in other text",
    ),
    "joint": ("The model beside a reference", "all probabilities over the vocabulary, under both models"),
    "rerun": ("Further runs of the model", "the model itself, which is run again over changed texts"),
    "knows_defence": (
        "Attacks that know the defense",
        "a reference model and how training was protected; those that learn also know the membership of other documents",
    ),
    "shadows": ("Shadow models", "the recipe of the training, and documents to train models with and without each one"),
}


@dataclass(frozen=True)
class Attackers:
    """The attacks of one kind that ran."""

    title: str
    """What they cost beside one run of each model."""
    knowledge: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Gap:
    """Something that was not tested."""

    what: str
    why: str


@dataclass(frozen=True)
class Requirement:
    """What a text asks for, in our words, and what this report says to it."""

    source: str
    asks: str
    answer: str


def attackers(report: AuditReport) -> list[Attackers]:
    """Return the kinds of attacks that ran on any model, in the registry's order."""
    kinds: dict[str, list[str]] = {}
    for name, label in attack_columns(report.rows).items():
        kinds.setdefault(ATTACKS[name].kind if name in ATTACKS else "others", []).append(label)
    other = ("Others", "attacks that this version does not know")
    found = []
    for kind, labels in kinds.items():
        title, knowledge = KNOWLEDGE.get(kind, other)
        if kind == "shadows" and report.settings.shadows is not None:
            title = f"{report.settings.shadows} shadow models"
        found.append(Attackers(title, knowledge, tuple(labels)))
    return found


def weak_references(report: AuditReport) -> list[str]:
    """Return the models that even the best of the attacker's references is clearly worse than.

    Both perplexities are those on the non-members, which neither is supposed to have read.
    """
    if not report.references:
        return []
    best = min(reference.perplexity_non_members for reference in report.references)
    return [row.name for row in report.rows if best > CLEARLY_WORSE * row.perplexity_non_members]


def not_tested(report: AuditReport) -> list[Gap]:
    """Return what no figure of this report is about, and why."""
    gaps = [*_attacks_not_run(report), *_parts_missing(report)]
    gaps.append(Gap("Attribute inference, model inversion, poisoning", "no attack of this audit aims at them"))
    gaps.append(
        Gap("The model behind its interface", "filters, rate limits and prompts of a service were not part of it")
    )
    return gaps


def _attacks_not_run(report: AuditReport) -> list[Gap]:
    """Return the attacks that did not run, those with one reason together."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in report.rows:
        for label, reason in row.not_run.items():
            reasons.setdefault(reason, {}).setdefault(label, []).append(row.name)
    gaps = []
    for reason, labels in reasons.items():
        models = {name: None for names in labels.values() for name in names}
        of_whom = "" if len(models) == len(report.rows) else f" on {', '.join(models)}"
        gaps.append(Gap(f"{_listed(labels)}{of_whom}", reason))
    seen = {*attack_columns(report.rows).values(), *(label for row in report.rows for label in row.not_run)}
    if unasked := [made.label for made in ATTACKS.values() if made.label not in seen]:
        gaps.append(Gap(_listed(unasked), NOT_ASKED))
    return gaps


def _parts_missing(report: AuditReport) -> list[Gap]:
    parts = (
        (
            f"True-positive rate at {percent(FALSE_ALARMS)} false alarms",
            lambda row: tpr_at(row) is None,
            lambda row: (
                f"needs {1 / FALSE_ALARMS:.0f} non-members"
                if row.n_non_members * FALSE_ALARMS < 1
                else "the rate is not in audit.fpr_targets, or the figures are of a version that did not combine attacks"
            ),
        ),
        (
            "Groups, e.g. all documents of one person",
            lambda row: row.groups is None,
            lambda _: "no group field was named",
        ),
        (
            "Word-for-word passages of members",
            lambda row: row.regurgitation is None,
            lambda _: "not run, or the figures are of a version without this test",
        ),
        ("Canaries", lambda row: row.canaries is None, lambda _: "the data was prepared without canaries"),
        (
            "The smallest leak that would have been seen",
            lambda row: row.power is None,
            lambda _: "not computed, or the figures are of a version without it",
        ),
    )
    gaps = []
    for what, missing, why in parts:
        of_whom = [row for row in report.rows if missing(row)]
        if of_whom:
            names = "" if len(of_whom) == len(report.rows) else f" of {', '.join(row.name for row in of_whom)}"
            gaps.append(Gap(what + names, why(of_whom[0])))
    if report.checks is None:
        gaps.append(Gap("Whether members and non-members differ by themselves", "the checks were not run"))
    elif report.checks.null_model is None:
        gaps.append(Gap("The attacks on a model that saw no member", "audit.null_model names no model"))
    return gaps


def requirements(report: AuditReport) -> list[Requirement]:
    """Return what EDPB Opinion 28/2024, OWASP AISVS 1.0 and NIST SP 800-226 ask of tests, and what is answered here.

    Read as data: no answer here says that a requirement is met.
    """
    rows = report.rows
    attacks = max(len(row.attacks) for row in rows)
    tried = f"{attacks} attack{'s' if attacks > 1 else ''}; strongest AUC and true-positive rate in the table above"
    again = _said(any(row.regurgitation for row in rows), "share of members and non-members with such a passage")
    canaries = _said(any(row.canaries for row in rows), "share of planted canaries whose secret comes back")
    private = [name.removeprefix("privacy of ") for name in report.identity if name.startswith("privacy of ")]
    stated = f"a statement for {', '.join(private)} below" if private else "no run of this report states one"
    bounds = [bound for row in rows if row.canaries for bound in row.canaries.epsilon]
    bound = (
        f"lower bounds from canaries, up to {max(bound.epsilon for bound in bounds):.2f}, that a claimed epsilon must exceed"
        if bounds
        else "no lower bound: there were no canaries"
    )
    edpb, owasp, nist = "EDPB Opinion 28/2024, para. 55", "OWASP AISVS 1.0", "NIST SP 800-226"
    return [
        Requirement(
            f"{edpb} (i)", "Tests against membership inference; each counts as evidence for the attacks that were tried only",
            f"{tried}. Attribute inference, named beside it, was not tested",
        ),
        Requirement(f"{edpb} (iii)", "Tests against regurgitation of training data", again),
        Requirement(f"{edpb} (v)", "Tests against reconstruction", f"in part: {canaries}"),
        Requirement(f"{edpb} (ii), (iv)", "Tests against exfiltration and model inversion", "not tested"),
        Requirement(
            f"{owasp}, C11.2.3", "Outputs calibrated so that predictions are less overconfident",
            "not measured; the loss gap shows by how much training documents are predicted better than others",
        ),
        Requirement(f"{owasp}, C11.2.4", "Differentially private training where data is sensitive", stated),
        Requirement(
            f"{owasp}, C11.2.5", "Simulated membership-inference attacks do no better than random guessing",
            "the verdicts above: a leak was found where the strongest attack's interval lies above .5",
        ),
        Requirement(
            nist, "A guarantee of differential privacy is judged by its epsilon together with the unit that it protects",
            f"unit: {unit(report)}; {bound}. Attacks that fail are no guarantee",
        ),
    ]  # fmt: skip


def unit(report: AuditReport) -> str:
    """Return whom the figures protect: a document, and the groups that were audited."""
    fields = {row.groups.field: None for row in report.rows if row.groups is not None}
    return "one document" + "".join(f", and all documents of one {field}" for field in fields)


def model_perplexities(rows: Sequence[ModelAudit]) -> str:
    """Return each model's perplexity on the non-members, in one line."""
    return ", ".join(f"{row.name} {perplexity(row.perplexity_non_members)}" for row in rows)


def _said(tested: bool, what: str) -> str:
    return what if tested else "not tested"


def _listed(labels: Sequence[str] | dict[str, list[str]]) -> str:
    return ", ".join(labels)
