"""What must hold between the hosts of a job: versions, clocks, ports, a folder that all of them see."""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from dualtok.doctor.result import CheckResult, judged
from dualtok.doctor.storage import scratch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dualtok.doctor.hosts import Session, UnreachableError

ROUNDS = 5
OPEN_PORTS = (
    "open all ports between the hosts (ranks choose theirs freely), make every name resolve to the address of the "
    "network for training (/etc/hosts), and set NCCL_SOCKET_IFNAME / GLOO_SOCKET_IFNAME"
)
SKEW_WARN, SKEW_FAIL = 0.1, 2.0
"""Seconds: beyond the first, times in the logs of two hosts cannot be put in order; beyond the second, what is judged
by the age of a file (locks, caches, signs of life) goes wrong."""


def check_same_versions(sessions: Sequence[Session]) -> CheckResult:
    """Compare Python, packages, CUDA, NCCL and the GPU driver of all hosts."""
    name = "same versions"
    found = {session.host.name: session.ask("read_versions") for session in sessions}
    parts = sorted({part for versions in found.values() for part in versions})
    different = []
    for part in parts:
        values = {host: versions.get(part, "none") for host, versions in found.items()}
        if len(set(values.values())) > 1:
            different.append(f"{part}: " + ", ".join(f"{value} on {host}" for host, value in values.items()))
    remedy = "install the same environment on every host (constraints.txt), or one that all of them share"
    return judged(name, different, f"{len(parts)} versions equal on {len(sessions)} hosts", remedy)


def check_clocks(sessions: Sequence[Session]) -> list[CheckResult]:
    """Compare the clock of each host with the first one's; the delay of ssh is taken out."""
    offsets = {session.host.name: clock_offset(session) for session in sessions}
    first = next(iter(offsets.values()))
    results = []
    for host, (offset, error) in offsets.items():
        skew = offset - first[0]
        text = f"{skew:+.3f} s against {sessions[0].host.name} (± {error + first[1]:.3f})"
        remedy = "start chrony or systemd-timesyncd on every host, with the same servers"
        certain = abs(skew) - error - first[1]
        status = "fail" if certain > SKEW_FAIL else "warn" if certain > SKEW_WARN else "ok"
        results.append(CheckResult("clock skew", status, text, "" if status == "ok" else remedy, host))  # type: ignore[arg-type]
    return results


def clock_offset(session: Session) -> tuple[float, float]:
    """Return the seconds that a host's clock is ahead of this one's, and the largest error: half a round trip."""
    best = (0.0, float("inf"))
    for _ in range(ROUNDS):
        sent, started = time.time(), time.perf_counter()
        there = session.ask("read_clock")
        half = (time.perf_counter() - started) / 2
        best = min(best, (there - sent - half, half), key=lambda measured: measured[1])
    return best


def check_ports(sessions: Sequence[Session]) -> list[CheckResult]:
    """Let every host connect to a port of every other one, by the name in the hostfile, as the ranks will."""
    ports = {session.host.name: session.ask("listen", host=session.host.name) for session in sessions}
    results = []
    for here in sessions:
        problems = []
        for host, port in ports.items():
            if host != here.host.name and (error := here.ask("connect", host=host, port=port)) is not None:
                problems.append(f"{here.host.name} cannot reach port {port} of {host}: {error}")
        others = len(sessions) - 1
        checked = judged("ports", problems, f"reaches {others} other{'s' * (others != 1)}", OPEN_PORTS)
        results.append(replace(checked, host=here.host.name))
    return results


def check_shared_folder(sessions: Sequence[Session], folder: Path) -> list[CheckResult]:
    """Write a file to ``folder`` from this host, read it on every other, and the other way round."""
    name, remedy = (
        "shared folder",
        "mount the same folder on every host at the same path, and let `output_dir` lie in it",
    )
    results = []
    try:
        with scratch(folder) as own:
            for session in sessions:
                ours, theirs = secrets.token_hex(8), secrets.token_hex(8)
                host = session.host.name
                asked, answered = own / f"from-here-{ours}", own / f"from-there-{theirs}"
                asked.write_text(ours)
                if session.ask("read_file", file=str(asked)) != ours:
                    problem = f"{host} does not see what this host writes to {folder}"
                elif (error := session.ask("write_file", file=str(answered), text=theirs)) is not None:
                    problem = f"{host} cannot write to {folder}: {error}"
                elif not answered.is_file() or answered.read_text() != theirs:
                    problem = f"this host does not see what {host} writes to {folder}"
                else:
                    results.append(CheckResult(name, "ok", f"{folder} is seen both ways", host=host))
                    continue
                results.append(CheckResult(name, "fail", problem, remedy, host))
    except OSError as error:
        return [
            CheckResult(name, "fail", f"{folder}: {error.strerror}", "fix the folder, or choose another output_dir")
        ]
    return results


def check_slots(sessions: Sequence[Session]) -> CheckResult:
    """Compare the ranks per host: DeepSpeed's launcher numbers local ranks as if they were equal."""
    slots = {session.host.name: session.host.slots for session in sessions}
    words = ", ".join(f"{host}: {count}" for host, count in slots.items())
    return judged(
        "slots",
        [f"not equal: {words}"] if len(set(slots.values())) > 1 else [],
        f"equal: {words}",
        "give every host as many slots as the smallest has: DeepSpeed's launcher (0.19.8) counts local ranks "
        "wrongly otherwise",
    )


def not_run(name: str, error: UnreachableError) -> CheckResult:
    """Return the line of a check between hosts that one of them did not answer."""
    return CheckResult(name, "not-run", str(error))
