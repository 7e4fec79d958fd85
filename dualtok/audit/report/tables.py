"""The audit's figures as text: for the terminal's last lines and for tables in HTML."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from dualtok.audit.attacks.registry import ATTACKS, names_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualtok.audit.report.base import Estimate
    from dualtok.audit.report.data import BoundMethod, EpsilonBound, ModelAudit


PUBLISHED = tuple(name for name, made in ATTACKS.items() if made.headline)
"""Attacks of the first table: the paper's four and Min-K%++. All that fits a terminal."""
KNOWS_DEFENCE = names_of("knows_defence", "shadows")
"""Attacks that know the defence, or how the model was trained."""


def attack_columns(rows: Sequence[ModelAudit]) -> dict[str, str]:
    """Return name -> label of every attack that any of the rows ran, in the order of the registry."""
    ran = {attack.name: attack.label for row in rows for attack in row.attacks}
    order = {name: position for position, name in enumerate(ATTACKS)}
    return {name: ran[name] for name in sorted(ran, key=lambda name: order.get(plain(name), len(order)))}


def plain(score: str) -> str:
    """Return the name of an attack without that of the attacker's reference it was run with, if it has one."""
    return score.partition("@")[0]


def reference_tables(rows: Sequence[ModelAudit]) -> list[Table]:
    """Return one table per further reference of the attacker's: AUC of the attacks with it; see :func:`_aucs`."""
    by_reference: dict[str, list[str]] = {}
    for name in attack_columns(rows):
        if reference := name.partition("@")[2]:
            by_reference.setdefault(reference, []).append(name)
    return [_aucs(rows, f"Attacks with the reference {name}", scores) for name, scores in by_reference.items()]


def share(value: float, digits: int = 3) -> str:
    """Return a number of [0, 1] without its leading zero: .967, 1.000."""
    return f"{value:.{digits}f}".removeprefix("0")


def interval(estimate: Estimate) -> str:
    """Return the ends of an interval: [.951, .981]."""
    return f"[{share(estimate.low)}, {share(estimate.high)}]"


def perplexity(value: float) -> str:
    """Return a perplexity with about five significant digits."""
    return f"{value:.3f}" if value < 1000 else f"{value:.4g}"


def comparison_table(rows: Sequence[ModelAudit], title: str = "Audit") -> Table:
    """Return one line per model: held-out perplexity, loss gap, AUC of each attack, strongest one two-sided.

    It has the attacks of :data:`PUBLISHED` alone and needs about 110 columns of terminal; :func:`token_table` and
    :func:`adaptive_table` have the others, but the strongest is of all.
    """
    caption = (
        "AUC one-sided, with intervals; strongest: max(AUC, 1 - AUC), its interval corrected for the number of attacks"
    )
    columns = {name: label for name, label in attack_columns(rows).items() if name in PUBLISHED}
    table = _by_model(title, caption, ["held-out\nPPL", "loss\ngap", *columns.values(), "strongest"])
    for row in rows:
        cells = []
        for name in columns:
            result = row.attack(name)
            cells.append("n/a" if result is None else _cell(result.auc))
        best = row.strongest
        cells.append(_cell(best.auc_two_sided, f" {best.label}"))
        ppl = perplexity(row.perplexity_non_members)
        # A model's own name may hold brackets, which rich would read as markup.
        table.add_row(escape(row.name), ppl, f"{row.loss_gap:+.3f}", *cells)
    return table


def token_table(rows: Sequence[ModelAudit], title: str = "Attacks on single tokens") -> Table:
    """Return one line per model: AUC of the published attacks that are not in the first table; see :func:`_aucs`."""
    return _aucs(rows, title, [name for name in names_of("single_pass", "joint") if name not in PUBLISHED])


def rerun_table(rows: Sequence[ModelAudit], title: str = "Attacks that run the model again") -> Table:
    """Return one line per model: AUC of the attacks that run a model again; see :func:`_aucs`."""
    return _aucs(rows, title, names_of("rerun"))


def _aucs(rows: Sequence[ModelAudit], title: str, names: Sequence[str]) -> Table:
    """Return one line per model, one column per attack of ``names`` that ran; without a line if none did."""
    columns = {name: label for name, label in attack_columns(rows).items() if name in names}
    table = _by_model(title, "AUC one-sided, with intervals", [*columns.values()])
    for row in rows if columns else ():
        cells = ["n/a" if (result := row.attack(name)) is None else _cell(result.auc) for name in columns]
        table.add_row(escape(row.name), *cells)
    return table


def adaptive_table(rows: Sequence[ModelAudit], title: str = "Attacks that know the defence") -> Table:
    """Return one line per model: AUC of the attacks that know the defence, and the p-value of all attacks.

    Without a line if none of them ran.
    """
    caption = "AUC one-sided, with intervals; p: of the strongest attack of all, permuting the labels"
    columns = {name: label for name, label in attack_columns(rows).items() if name in KNOWS_DEFENCE}
    table = _by_model(title, caption, [*columns.values(), "p"])
    for row in rows if columns else ():
        cells = ["n/a" if (result := row.attack(name)) is None else _cell(result.auc) for name in columns]
        p_value = "n/a" if row.strongest_p_value is None else share(row.strongest_p_value)
        table.add_row(escape(row.name), *cells, p_value)
    return table


def collection_table(rows: Sequence[ModelAudit], title: str = "Collections of documents") -> Table:
    """Return one line per model: can collections be told from non-members, by each score and at each size?"""
    caption = (
        "p-value of one collection of so many documents, corrected for all of the model (Holm), over the share of "
        "disjoint collections with p <= .05"
    )
    tests = list(dict.fromkeys((test.label, test.size) for row in rows for test in row.collections))
    table = _by_model(title, caption, [f"{label}\n{size}" for label, size in tests])
    for row in rows:
        found = [row.collection(label, size) for label, size in tests]
        cells = [
            "n/a" if test is None else f"{share(test.p_holm)}\n{share(test.rejected, 2)} of {test.collections}"
            for test in found
        ]
        table.add_row(escape(row.name), *cells)
    return table


def regurgitation_table(rows: Sequence[ModelAudit], title: str = "Regurgitation") -> Table:
    """Return one line per model: what it gives back of members / non-members word for word."""
    found = [(row.name, row.regurgitation) for row in rows if row.regurgitation is not None]
    lengths = list(dict.fromkeys(own.length for _, own in found))
    caption = (
        "members / non-members; extracted: share of the documents with a passage of so many tokens that greedy "
        "decoding gives back after its true prefix, with exact intervals; bits: log2 of the least expected queries "
        "for the cheapest passage; greedy: share of tokens; run: longest of any document, in tokens"
    )
    columns = [*(f"extracted\n{length} tokens" for length in lengths), "bits", "greedy", "run"]
    continued = next((own.continuations for _, own in found if own.continuations is not None), None)
    if continued is not None:
        columns += [f"continued\n{continued.tokens} after {continued.prefix}", "common run"]
        caption += "; continued: share of a sample given back whole by greedy decoding"
    table = _by_model(title, caption, columns)
    for name, own in found:
        shares = {own.length: f"{_cell(own.extracted_members)}\n{_cell(own.extracted_non_members)}"}
        cost = next((cost for cost in own.costs if cost.length == own.length), None)
        bits = (None, None) if cost is None else (cost.bits_members, cost.bits_non_members)
        runs = [None if side is None else side.largest for side in (own.runs_members, own.runs_non_members)]
        cells = [*(shares.get(length, "n/a") for length in lengths), _both(bits, ".1f")]
        cells += [_both((own.greedy_members, own.greedy_non_members), ".3f"), _both(runs, "d")]
        if (after := own.continuations) is not None:
            cells.append(f"{_cell(after.whole_members)}\n{_cell(after.whole_non_members)}")
            cells.append(_both((after.runs_members.largest, after.runs_non_members.largest), "d"))
        table.add_row(escape(name), *cells)
    return table


def _both(pair: Sequence[float | None], form: str) -> str:
    """Return the figures of members and non-members, one below the other."""
    return " /\n".join("n/a" if value is None else format(value, form) for value in pair)


def group_table(rows: Sequence[ModelAudit], title: str = "Groups of documents") -> Table:
    """Return one line per model audited by groups: the strongest attack on whole groups, and the worst group."""
    found = [(row.name, row.groups) for row in rows if row.groups is not None]
    caption = (
        "whole groups: strongest attack on all documents of a group, two-sided AUC; worst group: the members that "
        "differ most from non-members; intervals and p corrected for all attacks and groups; p among members: "
        "does it differ more than other members?"
    )
    columns = [
        "groups",
        "left out",
        "whole groups",
        "p",
        "worst group",
        "documents",
        "its AUC",
        "p",
        "p among\nmembers",
    ]
    table = _by_model(title, caption, columns)
    for name, groups in found:
        worst = groups.worst
        small = groups.small_member_groups + groups.small_non_member_groups
        single = groups.members_without_group + groups.non_members_without_group
        table.add_row(
            escape(name),
            f"{groups.member_groups} members\n{groups.non_member_groups} others",
            f"{small} small\n{single} documents",
            _cell(groups.strongest, f" {groups.strongest_label}"),
            share(groups.strongest_p_value),
            escape(worst.name),
            str(worst.documents),
            _cell(worst.auc, f" {worst.label}"),
            share(worst.p_value),
            share(worst.p_value_among_members),
        )
    return table


def canary_table(rows: Sequence[ModelAudit], title: str = "Canaries") -> Table:
    """Return one line per model audited with canaries: AUC, exposure, extracted secrets, lower bounds on epsilon."""
    found = [(row.name, row.canaries) for row in rows if row.canaries is not None]
    caption = (
        "included against left out by a fair coin; exposure: median in bits, extrapolated, of included / left out; "
        "extracted: share of the secrets; epsilon: lower bounds, corrected for the choice of guesses"
    )
    labels = list(dict.fromkeys(score.label for _, canaries in found for score in canaries.scores))
    deltas = list(dict.fromkeys(bound.delta for _, canaries in found for bound in canaries.epsilon))
    columns = ["included", *labels, "exposure", "extracted", *(f"epsilon\ndelta {delta:g}" for delta in deltas)]
    table = _by_model(title, caption, columns)
    for name, canaries in found:
        aucs = {score.label: score.auc for score in canaries.scores}
        bounds = {bound.delta: bound for bound in canaries.epsilon}
        pairs = (canaries.extracted_included, canaries.extracted_excluded)
        table.add_row(
            escape(name),
            f"{canaries.n_included} of {canaries.n_included + canaries.n_excluded}",
            *("n/a" if (auc := aucs.get(label)) is None else _cell(auc) for label in labels),
            " / ".join(map(median_exposure, (canaries.extrapolated.included, canaries.extrapolated.excluded))),
            " / ".join("n/a" if estimate is None else share(estimate.value, 2) for estimate in pairs),
            *(_bound_cell(bounds.get(delta)) for delta in deltas),
        )
    return table


METHODS: dict[BoundMethod, str] = {
    "steinke": "Steinke 2023",
    "f_dp": "f-DP",
    "f_dp_gaussian": "f-DP,\nGaussian",
    "independent_gaussian": "independent,\nGaussian",
}
"""Method of a bound on epsilon -> its name in tables."""


def bound_table(rows: Sequence[ModelAudit], title: str = "Lower bounds on epsilon, by method") -> Table:
    """Return one line per model audited with canaries: the bound of every method at every delta."""
    found = [(row.name, row.canaries) for row in rows if row.canaries is not None and row.canaries.other_bounds]
    caption = (
        "each holds by itself, the largest does not; the first was chosen in advance; Gaussian: if training is a "
        "Gaussian mechanism; independent: if, besides, canaries do not influence each other"
    )
    all_bounds = {
        name: {(bound.method, bound.delta): bound for bound in (*canaries.epsilon, *canaries.other_bounds)}
        for name, canaries in found
    }
    order = list(METHODS)
    columns = sorted({key for bounds in all_bounds.values() for key in bounds}, key=lambda k: (order.index(k[0]), k[1]))
    table = _by_model(title, caption, [f"{METHODS[method]}\ndelta {delta:g}" for method, delta in columns])
    for name, bounds in all_bounds.items():
        table.add_row(escape(name), *(_bound_cell(bounds.get(key)) for key in columns))
    return table


def _bound_cell(bound: EpsilonBound | None) -> str:
    """Return a lower bound over the guesses behind it, and over its mu if it has one."""
    if bound is None:
        return "n/a"
    mu = "" if bound.mu is None else f"\nmu {bound.mu:.2f}"
    return f"{bound.epsilon:.2f}\n{bound.correct} of {bound.guesses}{mu}"


def median_exposure(exposures: Sequence[float]) -> str:
    """Return the median of some exposures, in bits."""
    return f"{statistics.median(exposures):.1f}" if exposures else "n/a"


def _by_model(title: str, caption: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, caption=caption, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold")
    for label in columns:
        table.add_column(label, justify="right", no_wrap=True)
    return table


def _cell(estimate: Estimate, label: str = "") -> str:
    """Return a figure over its interval with two decimals, to spare width: .447 over .41-.52."""
    ends = "-".join(share(end, digits=2) for end in (estimate.low, estimate.high))
    return f"{share(estimate.value)}{label}\n{ends}"
