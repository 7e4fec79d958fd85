"""A job of several ranks with a deadline, whatever becomes of it; on this host, or as this host's share of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from dualtok.doctor.rank_checks import DOING, LINE, NAMES
from dualtok.doctor.result import CheckResult
from dualtok.launch.local import rank_environment, torchrun

if TYPE_CHECKING:
    from collections.abc import Sequence

SECONDS = 600.0
"""Deadline of a job: an operator may have to be compiled."""
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class RankJob:
    """A job to start."""

    module: str
    arguments: tuple[str, ...] = ()
    processes: int = 1
    """Ranks on this host."""
    nodes: int = 1
    node: int = 0
    master: str = ""
    """``host:port`` of node 0, if there are several."""
    seconds: float = SECONDS


@dataclass(frozen=True)
class Ended:
    """How it ended."""

    status: int | None
    """Exit status; None if the deadline came first."""
    output: str

    def last_error_line(self) -> str:
        """Return the line that says most about a failure."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        for begins in ("dualtok: error:", "[rank"):
            for line in lines:
                if line.startswith(begins) and "rror" in line:
                    return line[:400]
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["it printed nothing"])[-1][:400]


def run_ranks(job: RankJob) -> Ended:
    """Start a job's ranks on this host, wait for their end or the deadline, and leave no process behind."""
    where = ["--standalone"]
    if job.nodes > 1:
        host, _, port = job.master.rpartition(":")
        where = [f"--nnodes={job.nodes}", f"--node-rank={job.node}", f"--master-addr={host}", f"--master-port={port}"]
    command = torchrun(where, job.processes, job.module, list(job.arguments))
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            env=rank_environment(job.processes),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        status: int | None = None
        try:
            status = process.wait(job.seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(process.pid)
            process.wait()
        output.seek(0)
        return Ended(status, output.read())


def _end(pid: int) -> None:
    """End a process and all that it started, each in a session of its own."""
    try:
        launcher = psutil.Process(pid)
        family = [*launcher.children(recursive=True), launcher]
    except psutil.NoSuchProcess:
        return
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in family:
            try:
                end(process)
            except psutil.NoSuchProcess:
                continue
        _, family = psutil.wait_procs(family, timeout=GRACE_SECONDS)


def results_of(jobs: Sequence[Ended]) -> list[CheckResult]:
    """Return what the ranks of ``rank_checks`` found; each check that they did not get to says why."""
    lines = [line for job in jobs for line in job.output.splitlines()]
    found = {
        entry["name"]: CheckResult(**entry)
        for line in lines
        if line.startswith(LINE)
        for entry in [json.loads(line.removeprefix(LINE))]
    }
    missing = [name for name in NAMES if name not in found]
    if not missing:
        return list(found.values())
    doing = next((line.removeprefix(DOING) for line in reversed(lines) if line.startswith(DOING)), "starting")
    failed = next((job for job in jobs if job.status), None)
    if failed is None and any(job.status is None for job in jobs):
        reason, remedy = (
            f"no answer while {doing}",
            (
                "the ranks wait for each other: look at the addresses and interfaces (NCCL_SOCKET_IFNAME, "
                "GLOO_SOCKET_IFNAME, NCCL_DEBUG=INFO), at firewalls, and at the checks above"
            ),
        )
    else:
        words = (failed or jobs[0]).last_error_line()
        reason, remedy = f"the ranks ended while {doing}: {words}", "fix what the message names, and the checks above"
    first, *others = missing
    return [
        *found.values(),
        CheckResult(first, "fail", reason, remedy),
        *(CheckResult(name, "not-run", f"the ranks had ended: see {first}") for name in others),
    ]


def as_job(request: dict[str, object]) -> RankJob:
    """Return a job that came as JSON."""
    arguments = request.pop("arguments")
    assert isinstance(arguments, list)
    return RankJob(arguments=tuple(arguments), **request)  # type: ignore[arg-type]


def python_here() -> str:
    """Return this interpreter, which other hosts must have at the same place."""
    return os.path.abspath(sys.executable)  # noqa: PTH100  # Path.resolve would leave the virtual environment
