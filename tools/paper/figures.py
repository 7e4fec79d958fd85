"""The figures of all finished cells: what ``dualtok audit`` measured, with mean and spread over seeds."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dualtok.audit.attacks.base import ATTACKS, takes_references

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from paper.cell import Cell

MAP = "map"
"""First letters of the parts whose cells are the points of the map, which has a table of its own."""
SIZES = (10, 50)
"""Documents in the collections whose tests are tabulated."""
STRONGER = (", by ", ", reference known", ", first release known", ", further attacks")
"""Follows the name in rows that are a model once more, before a stronger attacker: with shadow models, with the
defender's reference, with an earlier release, with attacks that run the model again."""
OLD_NAMES = {
    "taken back": "interpolated",
    "reference, then probe": "reference, then auxiliary",
    "reference then probe": "reference then auxiliary",
}
"""Part of a row's name in folders written before 0.2 -> the same in present ones."""


@dataclass(frozen=True)
class Figure:
    """Mean and spread of one figure over seeds."""

    by_seed: dict[int, float]

    @property
    def values(self) -> tuple[float, ...]:
        """The figure under each seed."""
        return tuple(self.by_seed.values())

    def __str__(self) -> str:
        """Return ``mean ± sample standard deviation``."""
        digits = 1 if max(self.values) > 2 else 3
        mean = f"{statistics.fmean(self.values):.{digits}f}"
        return mean if len(self.values) == 1 else f"{mean} ± {statistics.stdev(self.values):.{digits}f}"


Row = dict[str, Figure]
"""Name of a figure -> the figure: ``perplexity``, ``gap``, ``strongest``, the AUC under each attack's name, its TPR
under ``tpr NAME``, ``collections SIZE`` and ``rejected SIZE``, and ``strongest@REFERENCE``: the largest two-sided AUC
of the attacks that compare with one of the attacker's references, without a name for the first."""
Table = dict[str, Row]
Entries = dict[str, dict[str, dict[str, list[dict[str, Any]]]]]
"""Corpus -> part -> row -> one entry per finished cell."""


def audits(cells: Sequence[Cell]) -> Iterator[tuple[Cell, str, dict[str, Any]]]:
    """Yield cell, part and ``audit.json`` of each finished audit, in the order in which a cell's were made."""
    for cell in cells:
        for file in sorted(cell.folder.glob("audit-*/audit/audit.json"), key=lambda file: file.stat().st_mtime):
            yield cell, file.parents[1].name.removeprefix("audit-"), json.loads(file.read_text())


def collect(cells: Sequence[Cell]) -> dict[str, dict[str, Table]]:
    """Return the figures of every row: corpus -> part -> row."""
    found: Entries = {}
    for cell, part, figures in audits(cells):
        if part.startswith(MAP):
            continue
        for model in figures["models"]:
            rows = found.setdefault(cell.corpus, {}).setdefault(part, {})
            rows.setdefault(present_name(model["name"]), []).append({"seed": cell.seed, **model})
    return {
        corpus: {part: {row: figures_of(entries) for row, entries in rows.items()} for part, rows in parts.items()}
        for corpus, parts in found.items()
    }


def present_name(row: str) -> str:
    """Return a row's name as it is now, from an audit of any version."""
    for old, new in OLD_NAMES.items():
        row = row.replace(old, new)
    return row


def figures_of(entries: Sequence[dict[str, Any]]) -> Row:
    """Return a row's figures from one entry per seed."""

    def over(value: Callable[[dict[str, Any]], float | None]) -> Figure | None:
        found = {int(entry["seed"]): float(v) for entry in entries if (v := value(entry)) is not None}
        return Figure(found) if found else None

    def attack(entry: dict[str, Any], name: str) -> dict[str, Any] | None:
        return next((a for a in entry["attacks"] if a["name"] == name), None)

    def tests(entry: dict[str, Any], size: int, key: str) -> list[float]:
        return [test[key] for test in entry["collections"] if test["size"] == size]

    found: dict[str, Figure | None] = {
        "perplexity": over(lambda entry: entry["perplexity_non_members"]),
        "strongest": over(lambda entry: entry["strongest"]["auc_two_sided"]["value"]),
        "gap": over(lambda entry: entry["loss_gap"]),
    }
    for size in SIZES:  # of the two scores that collections are tested by, the one that gives more away
        found[f"collections {size}"] = over(lambda entry, size=size: min(tests(entry, size, "p_holm"), default=None))
        found[f"rejected {size}"] = over(lambda entry, size=size: max(tests(entry, size, "rejected"), default=None))
    for reference in ("", *further_references(entries)):
        found[f"strongest@{reference}"] = over(
            lambda entry, reference=reference: max(
                (
                    max(a["auc"]["value"], 1 - a["auc"]["value"])
                    for a in entry["attacks"]
                    if reference_of(a["name"]) == reference
                ),
                default=None,
            )
        )
    for name in dict.fromkeys(a["name"] for entry in entries for a in entry["attacks"]):
        found[name] = over(lambda entry, name=name: (a := attack(entry, name)) and a["auc"]["value"])
        found[f"tpr {name}"] = over(lambda entry, name=name: (a := attack(entry, name)) and _tpr(a))
    return {name: figure for name, figure in found.items() if figure is not None}


def further_references(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the attacker's references behind the first, in the order of the attacks."""
    named = (a["name"].partition("@")[2] for entry in entries for a in entry["attacks"])
    return [name for name in dict.fromkeys(named) if name]


def reference_of(attack: str) -> str | None:
    """Return the reference that an attack compares with: "" for the first, None if it needs none."""
    name, _, reference = attack.partition("@")
    if reference:
        return reference
    return "" if name in ATTACKS and takes_references(ATTACKS[name]) else None


def _tpr(attack: dict[str, Any], rate: float = 0.01) -> float | None:
    found = next((entry for entry in attack["tpr"] if math.isclose(entry["target_fpr"], rate)), None)
    return found["tpr"]["value"] if found and found["tpr"] else None
