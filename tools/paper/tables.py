"""``results.md``, ``results.json`` and the trade-off plots: tables beside the paper's, claims, checks of the audits."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING

from paper.claims import claims
from paper.figures import SIZES, STRONGER, audits, collect
from paper.law import draw, observe, report
from paper.published import CORPUS, SAYS, published
from paper.steps import time_of

from dualtok.audit.attacks.registry import ATTACKS
from dualtok.files import write_text
from dualtok.train.engines.dp_account import stated
from dualtok.train.history import read_history

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from paper.cell import Cell
    from paper.figures import Row, Table
    from paper.steps import StepTime

PAPERS = ("loss", "ref", "min_k", "zlib")
"""The attacks of the paper's tables."""
WITH = "strongest@"
"""Goes before the name of a reference of the attacker's."""


def write_results(cells: Sequence[Cell], root: Path) -> None:
    """Write ``results.json``, ``results.md`` and the trade-off plots from all audits that are there."""
    parts, model = collect(cells), cells[0].scale.paper_model
    lines = [
        f"# The paper's tables at the scale {cells[0].scale.name}",
        "",
        "Mean ± sample standard deviation over seeds, where there are several.",
        "",
    ]
    plain: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {}
    for corpus, tables in parts.items():
        everything = {row: figures for table in tables.values() for row, figures in table.items()}
        plain[corpus] = {
            row: {name: figure.values for name, figure in figures.items()} for row, figures in everything.items()
        }
        for part, table in tables.items():
            lines += [f"## {corpus}, {part}", ""]
            if part in SAYS:
                lines += [f"The paper: {SAYS[part]}", ""]
            lines += [
                *table_1(table, model, corpus),
                "",
                *tpr_table(table),
                "",
                *all_attacks(table),
                "",
                *by_reference(table),
                "",
                *collections(table),
                "",
            ]
        lines += [f"## {corpus}, claims", "", *claims(everything), ""]
        trade_off(everything, root / f"trade-off-{corpus}.svg")
    if points := observe(cells):
        lines += ["## The map", "", *report(points), ""]
        draw(points, root / "map.svg")
    lines += [*_checks(cells), *_attackers(cells), *_privacy(cells), *_durations(cells)]
    for cell in cells:
        lines += [*_gaps(cell), *_dynamics(cell)]
    lines += _times(cells)
    write_text(root / "results.json", json.dumps(plain, indent=1))
    write_text(root / "results.md", "\n".join(lines))


def table_1(table: Table, model: str, corpus: str) -> Iterator[str]:
    """Yield one line per row: ours, and behind it the paper's figure for its model and the corpus that is nearest."""
    yield f"In brackets the paper's figure: {model}, {CORPUS[corpus]}; LoRA: Llama-2 7B."
    yield ""
    heads = ("perplexity", *(ATTACKS[name].label for name in PAPERS), "strongest, two-sided")
    yield f"| method | seeds | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 2) + "|"
    for row, figures in table.items():
        theirs = published(row, model, corpus)
        shown = [
            f"{figures.get(name, 'n/a')}" + (f" ({theirs[name]:g})" if name in theirs else "")
            for name in ("perplexity", *PAPERS, "strongest")
        ]
        yield f"| {row} | {len(figures['perplexity'].values)} | {' | '.join(shown)} |"


def tpr_table(table: Table) -> Iterator[str]:
    """Yield TPR at FPR .01 of the paper's attacks; its own table of them is not known here."""
    yield f"| TPR at FPR .01 (the paper's are not known here) | {' | '.join(ATTACKS[name].label for name in PAPERS)} |"
    yield "|---" * (len(PAPERS) + 1) + "|"
    for row, figures in table.items():
        yield f"| {row} | {' | '.join(str(figures.get(f'tpr {name}', 'n/a')) for name in PAPERS)} |"


def all_attacks(table: Table) -> Iterator[str]:
    """Yield the AUC of every other attack; below .5 an attacker flips the sign."""
    names = [
        name
        for name in dict.fromkeys(name for figures in table.values() for name in figures)
        if name in ATTACKS and name not in PAPERS
    ]
    if not names:
        return
    yield f"| AUC | {' | '.join(ATTACKS[name].label for name in names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for row, figures in table.items():
        yield f"| {row} | {' | '.join(str(figures.get(name, 'n/a')) for name in names)} |"


def by_reference(table: Table) -> Iterator[str]:
    """Yield the strongest attack with each of the attacker's references, where there are several."""
    names = [
        name.removeprefix(WITH)
        for name in dict.fromkeys(name for figures in table.values() for name in figures)
        if name.startswith(WITH)
    ]
    if len(names) < 2:
        return
    yield f"| strongest attack with a reference, two-sided AUC | {' | '.join(name or 'the first' for name in names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for row, figures in table.items():
        yield f"| {row} | {' | '.join(str(figures.get(WITH + name, 'n/a')) for name in names)} |"


def collections(table: Table) -> Iterator[str]:
    """Yield how well whole collections are told apart, by the better of the two scores that they are tested by."""
    heads = [f"p, {size} documents | share of collections of {size} with p <= .05" for size in SIZES]
    yield f"| collections (smallest p in any seed, Holm) | {' | '.join(heads)} |"
    yield "|---" * (2 * len(SIZES) + 1) + "|"
    for row, figures in table.items():
        yield f"| {row} | {' | '.join(_tested(figures, size) for size in SIZES)} |"


def _tested(figures: Row, size: int) -> str:
    p_value = figures.get(f"collections {size}")
    return f"{'n/a' if p_value is None else f'{min(p_value.values):.3f}'} | {figures.get(f'rejected {size}', 'n/a')}"


def trade_off(table: Table, path: Path) -> None:
    """Draw perplexity against the Ref attack and against the strongest attack."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(10, 4.2), layout="constrained")
    for axes, (name, label) in zip(
        canvas.subplots(1, 2, sharey=True),
        (("ref", "AUC of Ref"), ("strongest", "strongest attack, two-sided AUC")),
        strict=True,
    ):
        for row, figures in table.items():
            if name in figures and not any(under in row for under in STRONGER):
                point = statistics.fmean(figures[name].values), statistics.fmean(figures["perplexity"].values)
                if ", at w = " in row:
                    axes.plot(*point, ".", color="grey")
                    continue
                axes.plot(*point, "o")
                axes.annotate(row, point, fontsize=7, xytext=(4, 3), textcoords="offset points")
        axes.axvline(0.5, linewidth=0.6, color="grey")
        axes.set(xlabel=label, yscale="log")
    canvas.axes[0].set_ylabel("held-out perplexity")
    canvas.savefig(path)


def _checks(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield what each audit found in itself: a bag of words, a model that saw no member, warnings."""
    yield from ("## Checks of the audits", "")
    yield "| audit | AUC of a bag of words (99 %) | strongest attack on a model that saw no member, p | warnings |"
    yield "|---|---|---|---|"
    for cell, part, figures in audits(cells):
        checks, blind, null = figures["checks"], "n/a", "n/a"
        if checks["blind_auc"] is not None:
            blind = "{value:.3f} ({low:.3f} to {high:.3f})".format_map(checks["blind_auc"])
        if checks["null_model"] is not None:
            found = checks["null_model"]
            null = f"{found['strongest']['auc_two_sided']['value']:.3f}, p = {found['p_value']:.3f}"
        yield f"| {cell.name}, {part} | {blind} | {null} | {'; '.join(checks['warnings']) or 'none'} |"
    yield ""


def _attackers(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield the perplexity of the attacker's references on the non-members of each audit."""
    yield from ("## The attacker's references", "", "| audit | perplexity on the non-members |", "|---|---|")
    for cell, part, figures in audits(cells):
        known = figures.get("references", ())
        shown = [f"{reference['name']} {reference['perplexity_non_members']:.1f}" for reference in known]
        yield f"| {cell.name}, {part} | {', '.join(shown) or 'not noted'} |"
    yield ""


def _times(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield what the steps of the cells and of their base models took, by what they did."""
    spent: dict[str, list[StepTime]] = {}
    for folder in dict.fromkeys(folder for cell in cells for folder in (cell.base_folder, cell.folder)):
        for mark in sorted((folder / "done").glob("*")):
            if (taken := time_of(mark)) is not None:
                spent.setdefault(taken.verb, []).append(taken)
    if spent:
        yield from ("## Time", "", "| command | runs | minutes of the processor | minutes |", "|---|---|---|---|")
        for verb, times in sorted(spent.items(), key=lambda item: -sum(taken.processor for taken in item[1])):
            processor, wall = sum(taken.processor for taken in times), sum(taken.wall for taken in times)
            yield f"| {verb} | {len(times)} | {processor / 60:.1f} | {wall / 60:.1f} |"
        yield ""


def _privacy(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield what the accountant says of each DP-SGD run."""
    runs = {
        f"{cell.name}/{file.parent.name}": stated(file.parent)
        for cell in cells
        for file in sorted(cell.folder.glob("*/privacy.json"))
    }
    if runs:
        yield from ("## What the accountant says of DP-SGD", "", "| run | |", "|---|---|")
        yield from (f"| {name} | {said} |" for name, said in runs.items())
        yield ""


def _durations(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield the steps' time of the runs from scratch, for which the paper gives hours."""
    for cell in cells:
        histories = {name: read_history(cell.folder / name / "metrics.jsonl") for name in ("plain", "dual")}
        if cell.variant == "pretraining" and all(histories.values()):
            minutes = {
                name: sum(row["tokens"] / row["tokens_per_second"] for row in rows) / 60
                for name, rows in histories.items()
            }
            ratio = minutes["dual"] / minutes["plain"]
            yield from (f"## {cell.name}, time of the steps (paper: 10.10 h and 12.28 h, ratio 1.216)", "")
            yield f"plain {minutes['plain']:.1f} min, dual {minutes['dual']:.1f} min, ratio {ratio:.3f}."
            yield ""


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
    yield "| step | hard | memorized | first hard, now memorized | cosine of the gradients |"
    yield "|---|---|---|---|---|"
    for entry in json.loads(file.read_text()):
        cosine = "n/a" if entry["cosine"] is None else f"{entry['cosine']:.3f} ± {entry['cosine_deviation']:.3f}"
        shares = " | ".join(f"{entry[name]:.3f}" for name in ("hard", "memorized", "hard_to_memorized"))
        yield f"| {entry['step']} | {shares} | {cosine} |"
    yield ""
