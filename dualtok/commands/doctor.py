"""``dualtok doctor``: from the command line to a table."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from dualtok.config.load import load_run
from dualtok.doctor.examine import examine, examine_hosts
from dualtok.doctor.result import Subject, any_failed, as_json, print_table

RUNS = Path("runs")
"""Where runs write unless they say otherwise."""


def run_doctor(run_file: Path | None, hosts: Path | None, *, ssh: str, json: bool, quick: bool) -> bool:
    """Make the checks and print what they found; returns whether one failed.

    Args:
        run_file: a run whose settings are checked too.
        hosts: a hostfile; None examines this machine alone.
        ssh: the command that enters a host.
        json: print JSON.
        quick: leave out what takes long.

    Raises:
        ConfigError: the run or the hostfile cannot be read.
    """
    run = None if run_file is None else load_run(run_file)
    subject = Subject(RUNS if run is None else Path(run.output_dir), run, quick)
    with contextlib.redirect_stdout(sys.stderr):  # libraries print; the results alone go to standard output
        results = examine(subject) if hosts is None else examine_hosts(subject, hosts, ssh)
    if json:
        print(as_json(results))
    else:
        print_table(results)
    return any_failed(results)
