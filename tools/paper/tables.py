"""The figures of all cells: tables beside the paper's, its claims, the trade-off plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtok.engine.metrics import read_history
from dualtok.files import write_text

if TYPE_CHECKING:
    from paper.cell import Cell

PRIVATE = "DP-SGD (8, 1e-05)"
PAPER = {
    # GPT-2 124M on (Wikipedia, CC-news): perplexity, AUC of Loss, Ref, Min-K%, Zlib (arXiv 2502.19726, table 1).
    "base": ((34.429, 0.473, 0.513, 0.446, 0.497), (29.442, 0.505, 0.498, 0.520, 0.500)),
    "plain": ((12.729, 0.577, 0.967, 0.489, 0.544), (21.861, 0.607, 0.855, 0.549, 0.569)),
    "goldfish 25 %": ((12.853, 0.565, 0.954, 0.486, 0.537), (21.902, 0.608, 0.855, 0.547, 0.570)),
    PRIVATE: ((18.523, 0.463, 0.536, 0.448, 0.491), (26.022, 0.507, 0.513, 0.521, 0.502)),
    "dual": ((13.628, 0.454, 0.463, 0.470, 0.485), (23.733, 0.502, 0.495, 0.529, 0.499)),
}
STRONGER = (", by ", ", reference known")
"""Follows the name in rows that are a model once more, before an attacker with shadow models or its reference."""
COLUMNS = {"loss": "Loss", "ref": "Ref", "min_k": "Min-K%", "zlib": "Zlib"}


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


Entries = dict[str, dict[str, dict[str, list[dict[str, Any]]]]]
"""Corpus -> part -> row -> one entry per finished cell."""


def collect(cells: Sequence[Cell]) -> Entries:
    """Return what ``dualtok audit`` measured in all finished cells."""
    found: Entries = {}
    for cell in cells:
        for file in sorted(cell.folder.glob("audit-*/audit/audit.json"), key=lambda file: file.stat().st_mtime):
            part = file.parents[1].name.removeprefix("audit-")
            for model in json.loads(file.read_text())["models"]:
                rows = found.setdefault(cell.corpus, {}).setdefault(part, {})
                rows.setdefault(model["name"], []).append({"seed": cell.seed, **model})
    return found


def figures_of(entries: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Return a row's figures: held-out perplexity, each attack's AUC and TPR, the strongest attack."""

    def over(value: Callable[[dict[str, Any]], float | None]) -> Figure | None:
        found = {int(entry["seed"]): float(v) for entry in entries if (v := value(entry)) is not None}
        return Figure(found) if found else None

    def attack(entry: dict[str, Any], name: str) -> dict[str, Any] | None:
        return next((a for a in entry["attacks"] if a["name"] == name), None)

    found: dict[str, Figure | None] = {
        "perplexity": over(lambda entry: entry["perplexity_non_members"]),
        "strongest": over(lambda entry: entry["strongest"]["auc_two_sided"]["value"]),
        "gap": over(lambda entry: entry["loss_gap"]),
        "collections": over(
            lambda entry: min((test["p_holm"] for test in entry["collections"] if test["size"] == 50), default=None)
        ),
    }
    for name in dict.fromkeys(a["name"] for entry in entries for a in entry["attacks"]):
        found[name] = over(lambda entry, name=name: (a := attack(entry, name)) and a["auc"]["value"])
        found[f"tpr {name}"] = over(lambda entry, name=name: (a := attack(entry, name)) and _tpr(a))
    return {name: figure for name, figure in found.items() if figure is not None}


def _tpr(attack: dict[str, Any], rate: float = 0.01) -> float | None:
    found = next((entry for entry in attack["tpr"] if math.isclose(entry["target_fpr"], rate)), None)
    return found["tpr"]["value"] if found and found["tpr"] else None


def write_results(cells: Sequence[Cell], root: Path) -> None:
    """Write ``results.json``, ``results.md`` and the trade-off plots from all audits that are there."""
    parts = {corpus: {part: {row: figures_of(entries) for row, entries in rows.items()} for part, rows in found.items()}
             for corpus, found in collect(cells).items()}  # fmt: skip
    lines: list[str] = []
    plain: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {}
    for number, (corpus, tables) in enumerate(parts.items()):
        everything = {row: figures for table in tables.values() for row, figures in table.items()}
        plain[corpus] = {row: {name: figure.values for name, figure in figures.items()}
                         for row, figures in everything.items()}  # fmt: skip
        for part, table in tables.items():
            lines += [f"## {corpus}, {part}", "", *_table(table, number), ""]
        lines += [f"## {corpus}, the paper's claims", "", *_ordering(everything), ""]
        _trade_off(everything, root / f"trade-off-{corpus}.svg")
    for cell in cells:
        lines += [*_gaps(cell), *_dynamics(cell)]
    write_text(root / "results.json", json.dumps(plain, indent=1))
    write_text(root / "results.md", "\n".join(lines))


def _table(table: dict[str, dict[str, Figure]], column: int) -> Iterator[str]:
    """Yield one line per row: ours, and the paper's figure for GPT-2 behind it."""
    yield (
        "| method | seeds | perplexity (paper) | "
        + " | ".join(f"{label} (paper)" for label in COLUMNS.values())
        + (" | LiRA | strongest, two-sided | Ref TPR at FPR .01 |")
    )
    yield "|---" * (len(COLUMNS) + 6) + "|"
    for row, figures in table.items():
        paper = PAPER[row][min(column, 1)] if row in PAPER else None
        order = ("perplexity", "loss", "ref", "min_k", "zlib")
        theirs = dict(zip(order, paper, strict=True)) if paper else {}
        cells = [f"{figures[name]} ({theirs[name]:g})" if name in theirs else f"{figures.get(name, 'n/a')}"
                 for name in ("perplexity", *COLUMNS)]  # fmt: skip
        yield (
            f"| {row} | {len(figures['perplexity'].values)} | "
            + " | ".join(
                [*cells, str(figures.get("lira", "n/a")), str(figures["strongest"]), str(figures.get("tpr ref", "n/a"))]
            )
            + " |"
        )


def _ordering(table: dict[str, dict[str, Figure]]) -> Iterator[str]:
    """Yield whether each claim holds in every seed; ratios are this row's figure over the other's."""
    yield "| claim | holds |"
    yield "|---|---|"
    for row, low, high in (("plain", 0.75, 1.0), ("goldfish 25 %", 0.75, 1.0), (PRIVATE, 0.0, 0.6), ("dual", 0.0, 0.6)):
        if row in table:
            values = table[row]["ref"].values
            held = sum(low <= value <= high for value in values)
            yield f"| Ref AUC of {row} within [{low:g}, {high:g}] | {held} of {len(values)} seeds |"
    defended = ("dual", "dual_plus", "plain, taken back")
    for row, figures in table.items():
        if row in defended or any(row.startswith(f"{name}{under}") for name in defended for under in STRONGER):
            values = figures["strongest"].values
            held = sum(value <= 0.58 for value in values)
            yield f"| strongest attack on {row}, two-sided, at most .58 | {held} of {len(values)} seeds |"
            p_values = figures["collections"].values if "collections" in figures else ()
            held = sum(value >= 0.05 for value in p_values)
            yield f"| collections of 50 of {row} not told apart at p < .05 (Holm) | {held} of {len(p_values)} seeds |"
    yield from _better(table, "dual", PRIVATE)  # the abstract: by around 10 %
    yield from _better(table, "dual", "reference alone")
    for row in ("dual, cross-fitted", "dual_plus", "plain, taken back"):
        for other in ("dual", "reference alone"):
            yield from _better(table, row, other)


def _better(table: dict[str, dict[str, Figure]], row: str, other: str) -> Iterator[str]:
    if row in table and other in table:
        ours, theirs = (table[name]["perplexity"].by_seed for name in (row, other))
        ratios = {seed: ours[seed] / theirs[seed] for seed in ours if seed in theirs}  # a cell may not be done yet
        if ratios:
            held = sum(ratio < 1 for ratio in ratios.values())
            claim = f"perplexity of {row} below that of {other} (ratio {Figure(ratios)})"
            yield f"| {claim} | {held} of {len(ratios)} seeds |"


def _trade_off(table: dict[str, dict[str, Figure]], path: Path) -> None:
    """Draw perplexity against the Ref attack and against the strongest attack."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(10, 4.2), layout="constrained")
    for axes, (name, label) in zip(canvas.subplots(1, 2, sharey=True), (
        ("ref", "AUC of Ref"), ("strongest", "strongest attack, two-sided AUC"),
    ), strict=True):  # fmt: skip
        for row, figures in table.items():
            if name in figures and not any(under in row for under in STRONGER):
                point = statistics.fmean(figures[name].values), statistics.fmean(figures["perplexity"].values)
                axes.plot(*point, "o")
                axes.annotate(row, point, fontsize=7, xytext=(4, 3), textcoords="offset points")
        axes.axvline(0.5, linewidth=0.6, color="grey")
        axes.set(xlabel=label, yscale="log")
    canvas.axes[0].set_ylabel("held-out perplexity")
    canvas.savefig(path)


def _gaps(cell: Cell) -> Iterator[str]:
    """Yield the gap of losses between validation and members over time, where it was noted."""
    folders = [cell.folder / f"dynamics-{name}" for name in ("plain", "dual")]
    histories = [read_history(folder / "evaluations.jsonl") for folder in folders]
    if not all(histories):
        return
    yield from (f"## {cell.name}, loss on validation minus loss on members (paper: dual's is less than a tenth)", "")
    yield "| step | plain | dual |"
    yield "|---|---|---|"
    for plain, dual in zip(*histories, strict=True):
        gaps = [entry["validation_loss"] - entry["member_loss"] for entry in (plain, dual)]
        yield f"| {plain['step']} | {gaps[0]:.4f} | {gaps[1]:.4f} |"
    yield ""


def _dynamics(cell: Cell) -> Iterator[str]:
    """Yield what ``dynamics.py`` measured."""
    file = cell.folder / "dynamics-dual" / "dynamics.json"
    if not file.is_file():
        return
    yield from (f"## {cell.name}, tokens of the dual run (paper: cosine within +-.15)", "")
    yield "| step | hard | memorised | first hard, now memorised | cosine of the gradients |"
    yield "|---|---|---|---|---|"
    for entry in json.loads(file.read_text()):
        cosine = "n/a" if entry["cosine"] is None else f"{entry['cosine']:.3f} ± {entry['cosine_deviation']:.3f}"
        shares = " | ".join(f"{entry[name]:.3f}" for name in ("hard", "memorised", "hard_to_memorised"))
        yield f"| {entry['step']} | {shares} | {cosine} |"
    yield ""
