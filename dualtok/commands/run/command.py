"""The command line of ``dualtok run``, and what it prints in the end."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualtok.commands.processes import refuse_launcher
from dualtok.commands.settings.command import complete_setting

if TYPE_CHECKING:
    from dualtok.commands.run.step import Step

# Imported where they are used, for what they take to load: dualtok's settings (.3 s), and its commands (torch 1 s).


def run(
    run_file: Annotated[Path, typer.Argument(help="The run's YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings that replace the file's, e.g. train.steps=100.",
            show_default=False,
            autocompletion=complete_setting,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the single commands; start nothing.")] = False,
    redo: Annotated[
        bool, typer.Option("--redo", help="Train again what was trained with other settings; earlier runs are kept.")
    ] = False,
) -> None:
    """Do the whole job of one file: prepare, reference, scores, training, audit, report; goes on where it stopped."""
    refuse_launcher("run")
    from dualtok.commands.run.run import Way
    from dualtok.commands.run.step import Source
    from dualtok.commands.run.way import steps_of
    from dualtok.config.load import load_run

    started = time.monotonic()
    given = tuple(overrides or ())
    settings = load_run(run_file, given)
    steps = steps_of(Source(run_file, settings, given))
    way = Way(steps, Path(settings.output_dir), shlex.join(["dualtok", "run", str(run_file), *given]), redo=redo)
    if dry_run:
        way.print_commands()
        return
    print(f"{len(steps)} steps from {run_file} to {steps[-1].product}", flush=True)
    way.carry_out()
    finish(steps, started)


def finish(steps: list[Step], started: float) -> None:
    """Print the comparison of the models, how long it took, and where the report is."""
    from dualtok.commands.audit.run import print_figures
    from dualtok.commands.report import read_figures

    print_figures(read_figures(steps[-1].run.output_dir))
    print(f"finished after {(time.monotonic() - started) / 60:.1f} minutes\nreport: {steps[-1].product}", flush=True)
