"""The paper's claims and ours, each with the number of seeds in which it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paper.figures import STRONGER, Figure
from paper.published import PRIVATE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paper.figures import Table

QUIET = 0.58
"""Two-sided AUC of the strongest attack up to which a defence counts as one."""
LEVEL = 0.05
DUAL = ("dual", "dual, reference then auxiliary", "dual, from reference then auxiliary")
PLUS = ("dual_plus", "dual_plus, limit 0.55")
LIMITS = {"dual_plus": "0.53", "dual_plus, limit 0.55": "0.55"}
STOPPED_BY_LIMIT = {
    row: f"plain, from reference then auxiliary, stopped by the limit {limit}" for row, limit in LIMITS.items()
}
"""Row -> plain training whose best checkpoint keeps to the same limit."""
SCALES = {row: f"IA3, from reference then auxiliary, stopped by the limit {limit}" for row, limit in LIMITS.items()}
"""Row of ``dual_plus`` -> scales alone, whose best checkpoint keeps to the same limit."""
DEFENDED = (*DUAL, *PLUS, "plain, interpolated", *STOPPED_BY_LIMIT.values(), *SCALES.values())
REFERENCE = "reference, then auxiliary"
STOPPED = {"plain": "base", "plain, from reference then auxiliary": REFERENCE}
"""Plain training that may stop early -> where it starts."""
NO_MEMBER_SEEN = ("reference alone", REFERENCE)
"""Models of the auxiliary documents alone."""


def claims(table: Table) -> Iterator[str]:
    """Yield a Markdown table of whether each claim holds; ratios are the first row's figure over the other's.

    Args:
        table: the rows of one corpus, of all parts.
    """
    yield "| claim | holds |"
    yield "|---|---|"
    for row, low, high in (("plain", 0.75, 1.0), ("goldfish 25 %", 0.75, 1.0), (PRIVATE, 0.0, 0.6), ("dual", 0.0, 0.6)):
        if row in table:
            values = table[row]["ref"].values
            yield _line(f"Ref AUC of {row} within [{low:g}, {high:g}]", [low <= value <= high for value in values])
    for row, figures in table.items():
        if row in DEFENDED or any(row.startswith(f"{name}{under}") for name in DEFENDED for under in STRONGER):
            yield _line(
                f"strongest attack on {row}, two-sided, at most {QUIET:g}",
                [value <= QUIET for value in figures["strongest"].values],
            )
            p_values = figures["collections 50"].values if "collections 50" in figures else ()
            yield _line(
                f"collections of 50 of {row} not told apart at p < {LEVEL:g} (Holm)",
                [value >= LEVEL for value in p_values],
            )
    yield from better(table, "dual", PRIVATE, note="; the abstract: around .9")
    for row in (*DEFENDED, "dual, cross-fitted"):
        for other in (*DUAL, *NO_MEMBER_SEEN):
            if row != other:
                yield from better(table, row, other)
    for row, other in STOPPED_BY_LIMIT.items():
        yield from better(table, row, other)
    for row, scales in SCALES.items():
        for other in (row, STOPPED_BY_LIMIT[row]):
            yield from better(table, scales, other)
    yield from _stopped_early(table)


def better(table: Table, row: str, other: str, *, note: str = "") -> Iterator[str]:
    """Yield whether a row's perplexity is below another's, in the seeds that both have: a cell may not be done yet."""
    if row in table and other in table:
        ours, theirs = (table[name]["perplexity"].by_seed for name in (row, other))
        ratios = {seed: ours[seed] / theirs[seed] for seed in ours if seed in theirs}
        if ratios:
            claim = f"perplexity of {row} below that of {other} (ratio {Figure(ratios)}{note})"
            yield _line(claim, [ratio < 1 for ratio in ratios.values()])


def _stopped_early(table: Table) -> Iterator[str]:
    """Compare with the best plain training in each seed that the attacks do not recognise.

    The models at several values of w are chosen in the same way, by the audit's figures.
    """
    ours = {row: table[row]["perplexity"].by_seed for row in PLUS if row in table}
    for end in ("dual, cross-fitted", "plain, from reference then auxiliary"):
        ours[f"the best of the models between {REFERENCE} and {end} whose strongest attack is at most {QUIET:g}"] = (
            _quiet(table, REFERENCE, f"{end}, at w")
        )
    for row, perplexities in ours.items():
        for stopped, start in STOPPED.items():
            theirs = _quiet(table, start, f"{stopped}, step")
            ratios = {seed: value / theirs[seed] for seed, value in perplexities.items() if seed in theirs}
            if ratios:
                claim = f"perplexity of {row} below that of {stopped}, stopped while its strongest attack is at most"
                held = [ratio < 1 for ratio in ratios.values()]
                yield _line(f"{claim} {QUIET:g} (ratio {Figure(ratios)})", held)


def _quiet(table: Table, start: str, way: str) -> dict[int, float]:
    """Return each seed's lowest perplexity among a row and those that begin with ``way``; nothing without the latter.

    Only models that none of the attacks of their audit recognises count.
    """
    found: dict[int, float] = {}
    rows = [
        figures
        for name, figures in table.items()
        if name.startswith(way) and not any(under in name for under in STRONGER)
    ]
    for figures in (*rows, table[start]) if rows and start in table else ():
        for seed, perplexity in figures["perplexity"].by_seed.items():
            if figures["strongest"].by_seed.get(seed, 1) <= QUIET:
                found[seed] = min(perplexity, found.get(seed, perplexity))
    return found


def _line(claim: str, held: list[bool]) -> str:
    return f"| {claim} | {sum(held)} of {len(held)} seeds |"
