"""Options of ``dualtok gate``, read before anything that takes seconds is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualtok.commands.processes import refuse_launcher

# Imported where they are used, for what they take to load: dualtok's audit (numpy, scipy, matplotlib: 1 s).


def gate(
    report: Annotated[Path, typer.Argument(help="report.json, or the folder of it or of audit.json.")],
    *,
    max_strongest_auc: Annotated[
        float | None, typer.Option(metavar="AUC", help="Two-sided AUC of the strongest attack.")
    ] = None,
    max_tpr: Annotated[
        list[str] | None, typer.Option(metavar="TPR@FPR", help="Strongest attack's TPR at an FPR; may be repeated.")
    ] = None,
    max_extraction: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Members, and canaries, given back word for word.")
    ] = None,
    max_group_auc: Annotated[
        float | None, typer.Option(metavar="AUC", help="Worst group, and strongest attack on groups.")
    ] = None,
    max_epsilon: Annotated[float | None, typer.Option(metavar="EPS", help="Lower bounds on epsilon.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Judge this model only; may be repeated.")
    ] = None,
    compare: Annotated[
        str, typer.Option(metavar="WHAT", help="value, or the low or high end of its interval.")
    ] = "high",
    no_write: Annotated[bool, typer.Option("--no-write", help="Leave the report's files as they are.")] = False,
) -> None:
    """Compare a report with limits; exit status 0: passed, 1: above a limit, 2: cannot be said, or a wrong option."""
    refuse_launcher("gate")
    from dualtok.audit.report.gate import GateLimits, require_compared
    from dualtok.commands.gate.run import EXIT_STATUS, parse_tpr, run_gate

    limits = GateLimits(
        strongest_auc=max_strongest_auc,
        tpr=tuple(map(parse_tpr, max_tpr or [])),
        extraction=max_extraction,
        group_auc=max_group_auc,
        epsilon=max_epsilon,
    )
    verdict = run_gate(report, limits, compare=require_compared(compare), models=model or [], write=not no_write)
    raise typer.Exit(EXIT_STATUS[verdict.verdict])
