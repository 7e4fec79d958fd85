"""The law of the map: gain and leak as products of powers, fitted to the points that were measured.

    python tools/paper/law.py runs/map            # print the fit, its error on points left out, and the table
    python tools/paper/law.py runs/map --write    # and write dualtok/plan/leak.json, which ``dualtok plan`` predicts by

Every row of plain training is one observation. Errors are on whole points left out one by one, and on a whole corpus
left out: the second is what a user with other text has to expect.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from matplotlib.axes import Axes
    from paper.cell import Cell

if __package__ in (None, ""):
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from paper.figures import MAP, audits, reference_of

from dualtok.plan.leak import FILE, Law, Map, auc_of, expect, power_of

REFERENCE = "reference, then auxiliary"
DUAL = "dual, 3 epochs"
UNSEEN = ("base", REFERENCE)
"""Rows of models that have seen no private document."""
FIRST = "fortieth"
"""The attacker's first reference, whose name no attack has behind its own."""
EPOCHS = (1, 3, 10)
ENOUGH = 3
"""Points that a law is fitted to at least."""


@dataclass(frozen=True)
class Observed:
    """One row of one point."""

    corpus: str
    point: str
    row: str
    documents: int
    auxiliary: int
    """Documents that the reference has learned."""
    parameters: int
    epochs: float | None
    """Of plain training at the rates of the recipe; None of every other row."""
    perplexity: float
    gain: float
    """Over the base model, in nats per token."""
    over_reference: float
    """Over the reference alone, in nats per token."""
    auc: float
    """Of the strongest attack, two-sided."""
    by_attacker: dict[str, float]
    """Name of the attacker's reference -> the strongest attack with it."""


def observe(cells: Sequence[Cell]) -> list[Observed]:
    """Return all rows of all points of the map whose audit is there, those before shadow models included."""
    found: dict[str, tuple[Cell, dict[str, Any]]] = {}
    for cell, part, figures in audits(cells):
        if part.startswith(MAP):
            found.setdefault(cell.name, (cell, {}))[1].update({model["name"]: model for model in figures["models"]})
    return [row for cell, models in found.values() for row in _rows(cell, models)]


def _rows(cell: Cell, models: dict[str, Any]) -> Iterator[Observed]:
    base, reference = (math.log(models[row]["perplexity_non_members"]) for row in UNSEEN)
    for row, model in models.items():
        loss = math.log(model["perplexity_non_members"])
        words = row.split()
        plain = words[0] == "plain," and len(words) == 3
        yield Observed(
            corpus=cell.corpus,
            point=cell.name,
            row=row,
            documents=cell.counts["train"],
            auxiliary=2 * cell.counts["reference"],
            parameters=parameters(cell),
            epochs=float(words[1]) if plain else None,
            perplexity=model["perplexity_non_members"],
            gain=base - loss,
            over_reference=reference - loss,
            auc=model["strongest"]["auc_two_sided"]["value"],
            by_attacker=_by_attacker(model["attacks"]),
        )


def _by_attacker(attacks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the strongest two-sided AUC of the attacks with each of the attacker's references."""
    found: dict[str, float] = {}
    for attack in attacks:
        reference = reference_of(attack["name"])
        if reference is not None:
            auc = attack["auc"]["value"]
            name = reference or FIRST
            found[name] = max(found.get(name, 0.0), auc, 1 - auc)
    return found


def parameters(cell: Cell) -> int:
    """Return how many parameters the cell's models have."""
    shape = cell.scale.model["config"]
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    each = 4 * width**2 + 3 * width * inner + 2 * width
    return int(cell.scale.vocabulary * width + shape["num_hidden_layers"] * each + width)


Values = dict[str, float]
TERMS = ("epochs", "documents", "parameters")


def fit(rows: Sequence[Values], groups: Sequence[str]) -> tuple[Law, dict[str, list[float]]]:
    """Fit a law by least squares of ln y; returns it with the errors of ln y of each group left out.

    Args:
        rows: ``y`` and the terms of each observation; a term that does not vary gets the exponent 0.
        groups: of each row; the rows of a group are left out together.
    """
    errors: dict[str, list[float]] = {}
    for group in dict.fromkeys(groups):
        rest = [row for row, own in zip(rows, groups, strict=True) if own != group]
        without = _least_squares(rest)
        errors[group] = [
            math.log(without(**{term: row[term] for term in TERMS}) / row["y"])
            for row, own in zip(rows, groups, strict=True)
            if own == group
        ]
    every = [error for group in errors.values() for error in group]
    found = _least_squares(rows)
    error = math.sqrt(statistics.fmean(each**2 for each in every))
    return Law(found.intercept, found.epochs, found.documents, found.parameters, error), errors


def _least_squares(rows: Sequence[Values]) -> Law:
    logs = {term: np.log([row[term] for row in rows]) for term in TERMS}
    used = [term for term in TERMS if np.ptp(logs[term]) > 0]
    design = np.column_stack([np.ones(len(rows)), *(logs[term] for term in used)])
    values, *_ = np.linalg.lstsq(design, np.log([row["y"] for row in rows]), rcond=None)
    exponents = dict.fromkeys(TERMS, 0.0) | dict(zip(used, map(float, values[1:]), strict=True))
    return Law(float(values[0]), **exponents, error=0.0)


def make_map(rows: Sequence[Observed]) -> Map:
    """Fit all laws to what was measured."""
    floor = statistics.fmean(power_of(row.auc, 0) for row in rows if row.row in UNSEEN)
    plain = [row for row in rows if row.epochs is not None]
    leak, _ = fit(*_leaks(plain, floor))
    gain, _ = fit(*_gains(plain))
    reference, _ = fit(*_gains([row for row in rows if row.row == REFERENCE], reference=True))
    terms: dict[str, Callable[[Observed], float]] = {
        "documents": lambda row: row.documents,
        "epochs": lambda row: row.epochs or 1,
        "auxiliary": lambda row: row.auxiliary / row.documents,
        "parameters": lambda row: row.parameters,
    }
    ranges = {name: (min(map(value, plain)), max(map(value, plain))) for name, value in terms.items()}
    held = max((row.auc for row in rows if row.row == DUAL), default=math.nan)
    return Map(leak, gain, reference, floor, held, ranges, len({row.point for row in rows}))


def _terms(row: Observed, y: float) -> Values:
    return {"y": y, "epochs": row.epochs or 1, "documents": row.documents, "parameters": row.parameters}


def _leaks(plain: Sequence[Observed], floor: float) -> tuple[list[Values], list[str]]:
    """Return the observations of the leak; a row without any says nothing about powers."""
    seen = [(row, power_of(row.auc, floor)) for row in plain]
    seen = [(row, power) for row, power in seen if power > 0]
    return [_terms(row, power) for row, power in seen], [row.point for row, _ in seen]


def _gains(rows: Sequence[Observed], *, reference: bool = False) -> tuple[list[Values], list[str]]:
    gained = [row for row in rows if row.gain > 0]
    values = [_terms(row, row.gain) | ({"documents": row.auxiliary} if reference else {}) for row in gained]
    return values, [row.point for row in gained]


def report(rows: Sequence[Observed]) -> Iterator[str]:
    """Yield the table of the points, and the laws with their errors on what was left out, as Markdown."""
    heads = ("point", "method", "perplexity", "over the base, nats", "over the reference", "strongest", "by attacker")
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        attackers = ", ".join(f"{name} {value:.3f}" for name, value in row.by_attacker.items())
        yield (
            f"| {row.point} | {row.row} | {row.perplexity:.1f} | {row.gain:.3f} | {row.over_reference:+.3f} | "
            f"{row.auc:.3f} | {attackers} |"
        )
    yield ""
    if len({row.point for row in rows}) < ENOUGH:
        yield f"Fewer than {ENOUGH} points: no law is fitted."
        return
    known, plain = make_map(rows), [row for row in rows if row.epochs is not None]
    yield "| law | E | N | P | left out: point, error of AUC or gain (median, largest) | left out: corpus |"
    yield "|---|---|---|---|---|---|"
    leaks, gains = _leaks(plain, known.floor), _gains(plain)
    for name, law, (values, groups) in (("d'", known.leak, leaks), ("gain, nats", known.gain, gains)):
        told = [_errors(name, values, by, known.floor) for by in (groups, [group.split("-")[0] for group in groups])]
        yield f"| {name} | {law.epochs:.2f} | {law.documents:.2f} | {law.parameters:.2f} | {told[0]} | {told[1]} |"
    yield ""
    yield from predictions(known)


def predictions(known: Map) -> Iterator[str]:
    """Yield what the law expects of plain training within the ranges that were measured, for the smallest model."""
    low, high = known.ranges["documents"]
    counts = [low * 2**power for power in range(20) if low * 2**power <= high]
    reads = [count for count in EPOCHS if known.ranges["epochs"][0] <= count <= known.ranges["epochs"][1]]
    heads = [f"{count} epoch{'s' if count > 1 else ''}" for count in reads]
    yield f"| private documents | {' | '.join(f'AUC, {head}' for head in heads)} | the same: gain, nats |"
    yield "|---" * (len(heads) + 2) + "|"
    for documents in counts:
        said = [
            expect(
                known,
                documents=int(documents),
                epochs=count,
                auxiliary=0,
                parameters=int(known.ranges["parameters"][0]),
            )
            for count in reads
        ]
        aucs = " | ".join(f"{one.auc.value:.2f} ({one.auc.low:.2f} to {one.auc.high:.2f})" for one in said)
        gains = ", ".join(f"{one.gain.value:.2f}" for one in said)
        yield f"| {documents:,.0f} | {aucs} | {gains} |"


def _errors(name: str, values: Sequence[Values], groups: Sequence[str], floor: float) -> str:
    """Return median and largest error of what is predicted for groups left out: AUCs, or shares of the gain."""
    if len(set(groups)) < 2:
        return "n/a"
    _, errors = fit(values, groups)
    truth: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        truth.setdefault(group, []).append(value["y"])
    found = []
    for group, logs in errors.items():
        for error, y in zip(logs, truth[group], strict=True):
            said = y * math.exp(error)
            found.append(abs(auc_of(said, floor) - auc_of(y, floor)) if name == "d'" else abs(said / y - 1))
    return f"{statistics.median(found):.3f}, {max(found):.3f}"


def draw(rows: Sequence[Observed], path: Path) -> None:
    """Draw the strongest attack and the gain over the base against private documents; a line for each number of reads.

    The law is drawn through models of the smallest size.
    """
    from matplotlib.figure import Figure

    plain = [row for row in rows if row.epochs is not None]
    known = make_map(rows) if len({row.point for row in rows}) >= ENOUGH else None
    canvas = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = canvas.subplots(1, 2)
    for number, epochs in enumerate(sorted({row.epochs or 0 for row in plain})):
        read = [row for row in plain if row.epochs == epochs]
        colour = f"C{number}"
        for corpus, marker in zip(sorted({row.corpus for row in plain}), "os^v", strict=False):
            own = [row for row in read if row.corpus == corpus]
            label = f"{corpus}, {epochs:g} epoch{'s' if epochs > 1 else ''}"
            left.plot([row.documents for row in own], [row.auc for row in own], marker, color=colour, label=label)
            right.plot([row.documents for row in own], [row.gain for row in own], marker, color=colour)
        if known is not None:
            _draw_law(known, epochs, read, (left, right), colour)
    for axes, label in ((left, "strongest attack, two-sided AUC"), (right, "nats per token off the base's loss")):
        axes.set(xscale="log", xlabel="private documents", ylabel=label)
    left.axhline(0.5, linewidth=0.6, color="grey")
    left.legend(fontsize=7)
    canvas.savefig(path, metadata={"Date": None})


def _draw_law(known: Map, epochs: float, read: Sequence[Observed], axes: tuple[Axes, Axes], colour: str) -> None:
    documents = np.geomspace(min(row.documents for row in read), max(row.documents for row in read), 30)
    smallest = min(row.parameters for row in read)
    where = [{"epochs": epochs, "documents": float(count), "parameters": smallest} for count in documents]
    axes[0].plot(documents, [auc_of(known.leak(**each), known.floor) for each in where], color=colour, linewidth=0.8)
    axes[1].plot(documents, [known.gain(**each) for each in where], color=colour, linewidth=0.8)


def write_map(known: Map, path: Path) -> None:
    """Write the map as ``dualtok plan`` reads it."""
    path.write_text(json.dumps(asdict(known), indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Print the fit of a folder's points, and write it if asked."""
    from paper.grid import cell_of
    from paper.scales import SCALES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    scale = SCALES[options.scale]
    rows = observe([cell_of(scale, point, options.folder.resolve()) for point in scale.points])
    if not rows:
        raise SystemExit(f"{options.folder}: no point is measured; run tools/reproduce_paper.py --parts map first")
    print("\n".join(report(rows)))
    if options.write:
        write_map(make_map(rows), FILE)


if __name__ == "__main__":
    main()
