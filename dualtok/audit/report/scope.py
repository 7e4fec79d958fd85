"""What a report's figures are about: who attacked with what, what was not tested, and which requirement they answer.

Pure functions of the report's records.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dualtok.audit.attacks.base import ATTACKS
from dualtok.audit.report.tables import attack_columns, perplexity, plain
from dualtok.audit.report.verdict import FALSE_ALARMS, percent, tpr_at

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dualtok.audit.report.data import AuditReport, ModelAudit
    from dualtok.audit.report.details import AttackReference, GroupAudit

CLEARLY_WORSE = 1.25
"""Factor between a reference's and a model's perplexity on the non-members above which the reference is called weak."""
NOT_ASKED = "not asked for in audit.attacks or audit.shadows"
NEEDS = {
    "reference": "a reference model of the attacker's",
    "zlib": "the compressed sizes of the texts",
    "frequencies": "other text to count tokens in",
    "kl_from_reference": "a run of the model beside a reference",
    "shadows": "shadow models",
}
"""What attacks need, in words."""
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
        "a reference model, and knows how training was protected; those that learn also know the membership of others",
    ),
    "shadows": ("Shadow models", "the recipe of the training, and documents to train models with and without each one"),
}

OR_EARLIER = "or the figures are of a version without it"
PARTS: tuple[tuple[str, Callable[[ModelAudit], bool], str], ...] = (
    ("Groups, e.g. all documents of one person", lambda row: row.groups is not None, "no group field was named"),
    ("Word-for-word passages of members", lambda row: row.regurgitation is not None, f"not run, {OR_EARLIER}"),
    ("Canaries", lambda row: row.canaries is not None, "the data was prepared without canaries"),
    ("The smallest leak that would have been seen", lambda row: row.power is not None, f"not run, {OR_EARLIER}"),
)
"""Parts of a model's audit: name, whether it is there, and why it is not."""


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
        kinds.setdefault(ATTACKS[plain(name)].kind if plain(name) in ATTACKS else "others", []).append(label)
    other = ("Others", "what another version of dualtok describes")
    found = []
    for kind, labels in kinds.items():
        title, knowledge = KNOWLEDGE.get(kind, other)
        if kind == "shadows" and report.settings.shadows is not None:
            title = f"{report.settings.shadows} shadow models"
        found.append(Attackers(title, knowledge, tuple(labels)))
    return found


def weak_references(rows: Sequence[ModelAudit], references: Sequence[AttackReference]) -> list[str]:
    """Return the models that even the best of the attacker's references is clearly worse than.

    Both perplexities are those on the non-members, which neither is supposed to have read.
    """
    if not references:
        return []
    best = min(reference.perplexity_non_members for reference in references)
    return [row.name for row in rows if best > CLEARLY_WORSE * row.perplexity_non_members]


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
        gaps.append(Gap(f"{', '.join(labels)}{of_whom}", _in_words(reason)))
    seen = {*attack_columns(report.rows).values(), *(label for row in report.rows for label in row.not_run)}
    if unasked := [made.label for made in ATTACKS.values() if made.label not in seen]:
        gaps.append(Gap(", ".join(unasked), NOT_ASKED))
    return gaps


def _parts_missing(report: AuditReport) -> list[Gap]:
    gaps = []
    for what, is_there, why in PARTS:
        without = [row for row in report.rows if not is_there(row)]
        if without:
            names = "" if len(without) == len(report.rows) else f" of {', '.join(row.name for row in without)}"
            gaps.append(Gap(what + names, why))
    if grouped := next((row.groups for row in report.rows if row.groups is not None), None):
        gaps += _groups_left_out(grouped)
    rare = [row for row in report.rows if tpr_at(row) is None]
    if rare:
        few = max(row.n_non_members for row in rare) * FALSE_ALARMS < 1
        why = f"needs {1 / FALSE_ALARMS:.0f} non-members" if few else f"not in audit.fpr_targets, {OR_EARLIER}"
        gaps.append(Gap(f"True-positive rate at {percent(FALSE_ALARMS)} false alarms", why))
    if report.checks is None:
        gaps.append(Gap("Whether members and non-members differ by themselves", "the checks were not run"))
    elif report.checks.null_model is None:
        gaps.append(Gap("The attacks on a model that saw no member", "audit.null_model names no model"))
    return gaps


def _groups_left_out(groups: GroupAudit) -> list[Gap]:
    """Return the members that are in no group that was looked at; they are the same for all models."""
    gaps = []
    if groups.members_without_group:
        what = f"Groups of {groups.members_without_group} members"
        gaps.append(Gap(what, f"their field {groups.field} is empty"))
    if groups.small_member_groups:
        what = f"{groups.small_member_groups} small groups of members"
        gaps.append(Gap(what, f"fewer than {groups.min_documents} documents each"))
    return gaps


def requirements(report: AuditReport) -> list[Requirement]:
    """Return what EDPB Opinion 28/2024, OWASP AISVS 1.0 and NIST SP 800-226 ask of tests, and what is answered here.

    Read as data: no answer here says that a requirement is met.
    """
    rows = report.rows
    attacks = max(len(row.attacks) for row in rows)
    tried = f"{attacks} attack{'s' if attacks > 1 else ''}; strongest AUC and true-positive rate in the table above"
    again = "share of members and of non-members with such a passage, in the table above"
    canaries = "in part: share of planted canaries whose secret comes back, in the table above"
    private = [name.removeprefix("privacy of ") for name in report.identity if name.startswith("privacy of ")]
    stated = f"a statement for {', '.join(private)} below" if private else "no run of this report states one"
    edpb, owasp = "EDPB Opinion 28/2024, para. 55", "OWASP AISVS 1.0"
    asked = {
        f"{edpb} (i)": (
            "Tests against membership inference; what they show holds for the attacks that were tried only",
            f"{tried}. Attribute inference, named beside it, was not tested",
        ),
        f"{edpb} (iii)": (
            "Tests against regurgitation of training data",
            again if any(row.regurgitation for row in rows) else "not tested",
        ),
        f"{edpb} (v)": (
            "Tests against reconstruction",
            canaries if any(row.canaries for row in rows) else "not tested",
        ),
        f"{edpb} (ii), (iv)": ("Tests against exfiltration and model inversion", "not tested"),
        f"{owasp}, C11.2.3": (
            "Outputs calibrated so that predictions are less overconfident",
            "not measured; the loss gap shows by how much training documents are predicted better than others",
        ),
        f"{owasp}, C11.2.4": ("Differentially private training where data is sensitive", stated),
        f"{owasp}, C11.2.5": (
            "Simulated membership-inference attacks do no better than random guessing",
            "the verdicts above: a leak was found where the strongest attack's interval lies above .5",
        ),
        "NIST SP 800-226": (
            "A guarantee of differential privacy is judged by its epsilon and by the unit that it protects",
            f"unit: {unit(report)}; {_bounds(report)}. Attacks that fail are no guarantee",
        ),
    }
    return [Requirement(source, asks, answer) for source, (asks, answer) in asked.items()]


def _bounds(report: AuditReport) -> str:
    bounds = [bound.epsilon for row in report.rows if row.canaries for bound in row.canaries.epsilon]
    if not bounds:
        return "no lower bound on epsilon: there were no canaries"
    sure = percent(report.settings.confidence)
    return (
        f"lower bounds on epsilon from canaries, up to {max(bounds):.2f}: a smaller claim is contradicted ({sure} sure)"
    )


def unit(report: AuditReport) -> str:
    """Return whom the figures protect: a document, and the groups that were audited."""
    fields = {row.groups.field: None for row in report.rows if row.groups is not None}
    return "one document" + "".join(f", and all documents of one {field}" for field in fields)


def model_perplexities(rows: Sequence[ModelAudit]) -> str:
    """Return each model's perplexity on the non-members, in one line."""
    return ", ".join(f"{row.name} {perplexity(row.perplexity_non_members)}" for row in rows)


def _in_words(reason: str) -> str:
    """Return why an attack was not run without names of the code."""
    needs = reason.removeprefix("needs ").split(" and ")
    known = reason.startswith("needs ") and all(need in NEEDS for need in needs)
    return f"needs {' and '.join(NEEDS[need] for need in needs)}" if known else reason
