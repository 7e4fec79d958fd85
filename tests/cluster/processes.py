"""The processes of a run on this host."""

from __future__ import annotations

from pathlib import Path

import psutil


def rank_processes(run: Path) -> list[psutil.Process]:
    """Return the living ranks of a run, given as its file, without the processes that read their blocks ahead."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        python = "python" in Path(command[0]).name if command else False
        if python and str(run) in command and "-m" in command and command[command.index("-m") + 1] == "dualtok":
            found[process.pid] = process
    return [process for process in found.values() if process.ppid() not in found]
