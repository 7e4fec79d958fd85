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

    from paper.cell import Cell
    from paper.scales import Point

if __package__ in (None, ""):
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from paper.figures import audits

from dualtok.plan.leak import FILE, Law, Map, auc_of, power_of

REFERENCE = "reference, then auxiliary"
DUAL = "dual, 3 epochs"
UNSEEN = ("base", REFERENCE)
"""Rows of models that have seen no private document."""


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


def observe(cells: Sequence[tuple[Cell, Point]]) -> list[Observed]:
    """Return all rows of all points whose audit is there."""
    found = []
    points = {id(cell): point for cell, point in cells}
    for cell, part, figures in audits([cell for cell, _ in cells]):
        if part == "map":
            found += list(_rows(cell, points[id(cell)], figures))
    return found


def _rows(cell: Cell, point: Point, figures: dict[str, Any]) -> Iterator[Observed]:
    models = {model["name"]: model for model in figures["models"]}
    base, reference = (math.log(models[row]["perplexity_non_members"]) for row in UNSEEN)
    for row, model in models.items():
        loss = math.log(model["perplexity_non_members"])
        words = row.split()
        plain = words[0] == "plain," and len(words) == 3
        yield Observed(
            corpus=cell.corpus,
            point=cell.name,
            row=row,
            documents=point.documents,
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
    """Return the strongest two-sided AUC of the attacks that name one of the attacker's references."""
    found: dict[str, float] = {}
    for attack in attacks:
        reference = attack["name"].partition("@")[2]
        auc = attack["auc"]["value"]
        if reference:
            found[reference] = max(found.get(reference, 0.0), auc, 1 - auc)
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
        attackers = ", ".join(f"{value:.3f}" for value in row.by_attacker.values())
        yield (
            f"| {row.point} | {row.row} | {row.perplexity:.1f} | {row.gain:.3f} | {row.over_reference:+.3f} | "
            f"{row.auc:.3f} | {attackers} |"
        )
    known, plain = make_map(rows), [row for row in rows if row.epochs is not None]
    yield ""
    yield "| law | E | N | P | left out: point, error of AUC or gain (median, largest) | left out: corpus |"
    yield "|---|---|---|---|---|---|"
    leaks, gains = _leaks(plain, known.floor), _gains(plain)
    for name, law, (values, groups) in (("d'", known.leak, leaks), ("gain, nats", known.gain, gains)):
        told = [_errors(name, values, by, known.floor) for by in (groups, [group.split("-")[0] for group in groups])]
        yield f"| {name} | {law.epochs:.2f} | {law.documents:.2f} | {law.parameters:.2f} | {told[0]} | {told[1]} |"


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
    rows = observe([(cell_of(scale, point, options.folder.resolve()), point) for point in scale.points])
    if not rows:
        raise SystemExit(f"{options.folder}: no point is measured; run tools/reproduce_paper.py --parts map first")
    print("\n".join(report(rows)))
    if options.write:
        write_map(make_map(rows), FILE)


if __name__ == "__main__":
    main()
