"""What an audit's figures say about one model, in one sentence: the rule behind the report's first screen.

Pure functions of the records. A leak is what an interval or a p-value shows that is already corrected for the number of
attacks, groups, scores or sizes tried, so that each kind of test errs in at most one of twenty sound audits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dualtok.audit.report.tables import share

if TYPE_CHECKING:
    from dualtok.audit.report.base import Estimate
    from dualtok.audit.report.data import CanaryAudit, Checks, ModelAudit, StrongestTpr

LARGEST_UNSEEN = 0.7
"""AUC up to which "no attack worked" is said; where an audit would miss a larger one, nothing can be said. From .7 on a
test is usually called acceptable at telling two classes apart (Hosmer, Lemeshow and Sturdivant 2013, section 5.2.4)."""
FEWEST_DOCUMENTS = 100
"""Documents a side below which nothing can be said where the power was not computed."""
FALSE_ALARMS = 0.01
"""False-positive rate of the summary's true-positive rate."""
SURPRISING = 0.05
"""Corrected p-value up to which a collection of documents is recognized."""

Kind = Literal["leak", "none", "unknown"]
WORDS: dict[Kind, str] = {"leak": "Leak found", "none": "No leak found", "unknown": "Cannot be said"}


@dataclass(frozen=True)
class Verdict:
    """What can be said of one model."""

    kind: Kind
    sentence: str
    """In words, with the figures that it rests on; ends with a full stop."""
    doubtful: bool = False
    """Whether the audit's checks warn of something."""
    also: tuple[str, ...] = ()
    """What else leaks, in a few words each."""

    @property
    def word(self) -> str:
        """The verdict in two or three words, to stand beside its color."""
        return WORDS[self.kind]


def verdict_of(model: ModelAudit, checks: Checks | None) -> Verdict:
    """Return what an audit's figures say about one model.

    Nothing can be said where the checks void the audit. Otherwise there is a leak if one of these is so:

    * the corrected lower end of the strongest attack's two-sided AUC is above .5, on documents or on whole groups, or
      that of the worst group's AUC;
    * more members than non-members come back word for word (their intervals do not meet); likewise canaries' secrets;
    * the guesses about canaries refute some epsilon; a collection of documents is recognized (p after Holm <= .05).

    Otherwise there is none, if the audit would have seen an attack of AUC :data:`LARGEST_UNSEEN`; where its power was
    not computed, if it had at least :data:`FEWEST_DOCUMENTS` members and non-members.
    """
    doubtful = checks is not None and bool(checks.warnings)
    reason = void_reason(checks)
    if reason is not None:
        return Verdict("unknown", f"No figure of this audit means anything: {reason}.", doubtful)
    found = _findings(model)
    if not found:
        return _nothing_found(model, doubtful)
    (kind, sentence), *others = found
    if kind != "documents":
        sentence = f"No attack on single documents worked, but {sentence}"
    return Verdict("leak", f"{sentence}.", doubtful, tuple(name for name, _ in others))


def void_reason(checks: Checks | None) -> str | None:
    """Return why no figure of an audit means anything, in short; None if the checks found nothing of that kind."""
    if checks is None:
        return None
    voiding = [text.removeprefix("void:").strip() for text in checks.warnings if text.startswith("void:")]
    if not (checks.void or voiding):
        return None
    # What stands before the first semicolon or bracket says what was found; the rest is advice, which the checks show.
    first = (voiding or checks.warnings or ["members and non-members differ or overlap by themselves"])[0]
    return first.partition(";")[0].partition(" (")[0].rstrip(".")


def tpr_at(model: ModelAudit, false_alarms: float = FALSE_ALARMS) -> StrongestTpr | None:
    """Return the best true-positive rate at a false-positive rate, or None if it was not measured."""
    return next((rate for rate in model.strongest_tpr if abs(rate.target_fpr - false_alarms) < 1e-12), None)


def percent(value: float) -> str:
    """Return a share in percent, with a decimal where it would read as none or all: 48 %, 0.4 %, 99.7 %.

    A space that no line is broken at stands before the sign.
    """
    whole = f"{value * 100:.0f}"
    digits = 1 if whole in ("0", "100") and 0 < value < 1 else 0
    shown = f"{value * 100:.{digits}f}"
    if 0 < value < 0.0005:
        shown = "< 0.1"
    elif 0.9995 <= value < 1:
        shown = "> 99.9"
    return f"{shown}\N{NO-BREAK SPACE}%"


def short(estimate: Estimate) -> str:
    """Return a figure with its interval in two decimals: .95 [.93, .98]; more where a lower end would read as .5."""
    digits = 2
    while estimate.low > 0.5 and round(estimate.low, digits) <= 0.5 and digits < 6:
        digits += 1
    value, low, high = (share(end, digits) for end in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _findings(model: ModelAudit) -> list[tuple[str, str]]:
    """Return what leaks: (name, clause of a sentence), attacks on single documents first."""
    found = []
    best = model.strongest
    if best.auc_two_sided.low > 0.5:
        rate = tpr_at(model)
        told = f", {percent(rate.tpr.value)} found at {percent(rate.target_fpr)} false alarms" if rate else ""
        clause = f"Members can be told from non-members: strongest attack {short(best.auc_two_sided)} ({best.label})"
        found.append(("documents", clause + told))
    groups = model.groups
    if groups is not None and groups.strongest.low > 0.5:
        clause = f"all documents of one {groups.field} together can be told from others: {short(groups.strongest)}"
        found.append(("groups", f"{clause} ({groups.strongest_label})"))
    elif groups is not None and groups.worst.auc.low > 0.5:
        clause = f"the documents of one {groups.field} ({groups.worst.name}) can be told from non-members"
        found.append(("one group", f"{clause}: {short(groups.worst.auc)} ({groups.worst.label})"))
    again = model.regurgitation
    if again is not None and again.extracted_members.low > again.extracted_non_members.high:
        shares = f"{percent(again.extracted_members.value)} of the members"
        others = f"{percent(again.extracted_non_members.value)} of the non-members"
        found.append(("passages", f"{again.length} tokens come back word for word of {shares} ({others})"))
    if model.canaries is not None:
        found += _of_canaries(model.canaries)
    recognized = [test for test in model.collections if test.p_holm <= SURPRISING]
    if recognized:
        test = min(recognized, key=lambda test: test.size)
        clause = (
            f"{test.size} documents together can be told from as many others (p {share(test.p_holm)}, {test.label})"
        )
        found.append(("collections", clause))
    return found


def _of_canaries(canaries: CanaryAudit) -> list[tuple[str, str]]:
    included, excluded = canaries.extracted_included, canaries.extracted_excluded
    found = []
    if included is not None and included.low > (excluded.high if excluded is not None else 0.0):
        clause = f"{percent(included.value)} of the planted canaries' secrets come back word for word"
        found.append(("canaries", clause))
    refuted = [bound for bound in canaries.epsilon if bound.epsilon > 0]
    if refuted:
        bound = max(refuted, key=lambda bound: bound.epsilon)
        clause = f"guesses about planted canaries refute an epsilon below {bound.epsilon:.2f} (delta {bound.delta:g})"
        found.append(("epsilon", clause))
    return found


def _nothing_found(model: ModelAudit, doubtful: bool) -> Verdict:
    count = len(model.attacks)
    none = "The one attack that was run did not work" if count == 1 else f"No attack of {count} worked"
    documents = f"{model.n_members} members and {model.n_non_members} non-members"
    power = model.power
    if power is None:
        if min(model.n_members, model.n_non_members) < FEWEST_DOCUMENTS:
            return Verdict("unknown", f"{none}, but {documents} are too few to see a small leak.", doubtful)
        return Verdict("none", f"{none}; how small a leak would have been seen was not computed.", doubtful)
    if power.auc > LARGEST_UNSEEN:
        missed = f"with {documents} a leak up to AUC {share(power.auc, 2)} can go unseen"
        return Verdict("unknown", f"{none}, but {missed}.", doubtful)
    seen = f"a leak above AUC {share(power.auc, 2)} would have been seen (probability {share(power.probability, 2)})"
    return Verdict("none", f"{none}; {seen}.", doubtful)
