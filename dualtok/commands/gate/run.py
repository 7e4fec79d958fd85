"""``dualtok gate``: say whether a report's figures keep to limits, in words, in the report and as an exit status."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dualtok.audit.report.data import AuditFigures
from dualtok.audit.report.gate import COMPARED, TprLimit, judge, number, verdict_line
from dualtok.audit.report.write import load_report, write_report
from dualtok.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dualtok.audit.report.data import AuditReport, Checks, ModelAudit
    from dualtok.audit.report.details import Compared, GateVerdict, Verdict
    from dualtok.audit.report.gate import GateLimits

EXIT_STATUS: dict[Verdict, int] = {"passed": 0, "above": 1, "cannot be said": 2}
REPORT, FIGURES = "report.json", "audit.json"
TABLE_WIDTH = 120


def run_gate(
    place: Path, limits: GateLimits, *, compare: Compared = "high", models: Sequence[str] = (), write: bool = True
) -> GateVerdict:
    """Judge a report, print what was found, and write the verdict into the report.

    Args:
        place: a ``report.json``, its folder, the folder of ``audit.json``, or the ``output_dir`` that holds both.
        limits: the largest figures allowed.
        compare: the figure itself, or an end of its interval.
        models: names of the models to judge; without any, all but the null model and the attacker's reference.
        write: write ``report.json``, ``report.html`` and the other files of the report again, with the verdict.

    Raises:
        ConfigError: a model is not in the report, or none is left.
        DataError: there is no report, it cannot be read, or it is older than the figures beside it.
    """
    path = find_report(place)
    report = load_report(path)
    _require_current(report, path, place)
    verdict = judge(report, limits, compare=compare, models=models)
    if write:
        write_report(report.model_copy(update={"gate": verdict}), path.parent)
    _show(verdict, report)
    return verdict


def parse_tpr(text: str) -> TprLimit:
    """Return the limit that ``LIMIT@FPR`` states, e.g. ``.05@.01``.

    Raises:
        ConfigError: it is not of this form.
    """
    limit, _, fpr = text.partition("@")
    try:
        return TprLimit(float(limit), float(fpr))
    except ValueError:
        raise ConfigError(
            f"--max-tpr {text!r}: give a limit and a false-positive rate, e.g. .05@.01 for a TPR of 5 % at 1 %"
        ) from None


def find_report(place: Path) -> Path:
    """Return the ``report.json`` of a file or folder.

    Raises:
        DataError: there is none.
    """
    if place.is_file() and place.name != FIGURES:
        return place
    folder = place.parent if place.is_file() else place
    near = [folder / REPORT, folder / "report" / REPORT]
    if (folder / FIGURES).is_file():
        near.append(folder.parent / "report" / REPORT)
    found = next((path for path in near if path.is_file()), None)
    if found is None:
        raise DataError(f"{place}: no {REPORT} there; run `dualtok report` first, or give the path of one")
    return found


def _require_current(report: AuditReport, path: Path, place: Path) -> None:
    """Raise DataError if the audit's own figures were asked for, and the report was made of others."""
    folder = place.parent if place.is_file() else place
    files = [folder / FIGURES, folder / "audit" / FIGURES]
    figures = next((file for file in files if file.is_file() and place.name != REPORT), None)
    if figures is None:
        return
    try:
        measured = AuditFigures.model_validate_json(figures.read_bytes())
    except ValueError:
        raise DataError(f"{figures}: malformed; run `dualtok audit` again") from None
    # As text, in which what is not a number equals itself.
    if _text_of(measured.models, measured.checks) != _text_of(report.rows, report.checks):
        raise DataError(f"{path}: made of other figures than {figures}; run `dualtok report` again")


def _text_of(models: Sequence[ModelAudit], checks: Checks | None) -> list[str]:
    return [record.model_dump_json() for record in (*models, *([] if checks is None else [checks]))]


def _show(verdict: GateVerdict, report: AuditReport) -> None:
    """Print the table, what casts doubt on it, and the verdict; without a terminal as wide as the table needs."""
    console = Console()
    console = console if console.is_terminal else Console(width=TABLE_WIDTH)
    table = Table(title="Gate", caption=f"compared: {COMPARED[verdict.compare]}, unless noted")
    for column in ("model", "figure", "found", "limit", "verdict", "note"):
        table.add_column(column, justify="right" if column in ("found", "limit") else "left")
    for check in verdict.checks:
        value = "n/a" if check.value is None else number(check.value)
        cells = (check.model, check.figure, value, number(check.limit), check.verdict, check.reason)
        table.add_row(*map(escape, cells))
    console.print(table)
    for name, reason in verdict.left_out.items():
        console.print(f"not judged: {name} ({reason})", markup=False, soft_wrap=True)
    for warning in report.checks.warnings if report.checks is not None else ():
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    console.print(verdict_line(verdict), markup=False, soft_wrap=True)
