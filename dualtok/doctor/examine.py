"""Which checks are made, in which order, and which of them say that others need not be tried."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dualtok.doctor import between_hosts as between
from dualtok.doctor.building import check_compiler, check_locks, check_operators, operators_needed
from dualtok.doctor.hosts import Host, Session, UnreachableError
from dualtok.doctor.machine import (
    check_accelerator,
    check_clock,
    check_limits,
    check_memory,
    check_network,
    check_shared_memory,
    local_ranks,
)
from dualtok.doctor.rank_checks import NAMES
from dualtok.doctor.rank_job import SECONDS, Ended, RankJob, results_of, run_ranks
from dualtok.doctor.result import CheckResult
from dualtok.doctor.run_file import check_run
from dualtok.doctor.storage import check_disk, scratch
from dualtok.doctor.training import NAME as TRAINING
from dualtok.doctor.training import check_training
from dualtok.doctor.versions import check_deepspeed, check_versions
from dualtok.launch.hostfile import read_hostfile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from dualtok.doctor.result import Subject

    Start = Callable[[str, list[str]], Sequence[Ended]]

STOPPERS = ("deepspeed", "accelerator", "JIT locks", "operators", "shared memory")
"""Where one of these fails, ranks would not get anywhere."""
LEFT_OUT = "left out by --quick"


def examine(subject: Subject) -> list[CheckResult]:
    """Examine this host, alone."""
    ranks = local_ranks(subject)
    results = machine_checks(subject, ranks)
    if subject.run is not None:
        results.append(check_run(subject.run, ranks))

    def start(module: str, arguments: list[str]) -> list[Ended]:
        return [run_ranks(RankJob(module, tuple(arguments), processes=ranks))]

    return results + checks_of_ranks(subject, ranks, start, results)


def machine_checks(subject: Subject, ranks: int | None = None) -> list[CheckResult]:
    """Make the checks of one host.

    Args:
        subject: what is examined.
        ranks: ranks on this host; None finds out.
    """
    ranks = ranks or local_ranks(subject)
    locks = check_locks()
    return [
        check_versions(),
        check_deepspeed(),
        check_accelerator(subject),
        check_compiler(),
        locks,
        check_operators(operators_needed(subject), quick=subject.quick, locks=locks),
        check_memory(ranks),
        check_shared_memory(ranks),
        check_limits(),
        check_disk(subject.folder, quick=subject.quick),
        check_clock(),
        check_network(),
    ]


def checks_of_ranks(subject: Subject, ranks: int, start: Start, before: Sequence[CheckResult]) -> list[CheckResult]:
    """Start ranks for what they alone can find out; those not tried say why.

    Args:
        subject: what is examined.
        ranks: of the whole job.
        start: starts a module with arguments on all ranks and waits; one result per host.
        before: what was found so far.
    """
    stoppers = [result for result in before if result.status == "fail" and result.name in STOPPERS]
    reason = LEFT_OUT if subject.quick else f"would not get far: see {stoppers[0].name}" if stoppers else ""
    if reason:
        return [CheckResult(name, "not-run", reason) for name in (*NAMES, TRAINING)]
    results = results_of(start("dualtok.doctor.rank_checks", []))
    apart = [result for result in before if result.status == "fail" and result.name in ("shared folder", "disk")]
    if apart:
        return [*results, CheckResult(TRAINING, "not-run", f"has no folder to write to: see {apart[0].name}")]
    if results[0].status == "fail":
        return [*results, CheckResult(TRAINING, "not-run", f"the ranks do not meet: see {results[0].name}")]
    with scratch(subject.folder) as own:
        trained = check_training(own.absolute(), subject.run, ranks, lambda arguments: start("dualtok", arguments))
    return [*results, trained]


def examine_hosts(subject: Subject, hostfile: Path, ssh: str) -> list[CheckResult]:
    """Examine every host of a hostfile and what lies between them.

    Args:
        subject: what is examined.
        hostfile: lines ``NAME slots=N``.
        ssh: the command that enters a host.
    """
    results: list[CheckResult] = []
    sessions: list[Session] = []
    with ExitStack() as stack:
        for host in (Host(name, slots) for name, slots in read_hostfile(hostfile).items()):
            try:
                sessions.append(stack.enter_context(Session(host, ssh)))
                results.append(CheckResult("ssh", "ok", "enters, and finds dualtok", host=host.name))
            except UnreachableError as error:
                results.append(
                    CheckResult(
                        "ssh",
                        "fail",
                        str(error),
                        f"make `{ssh} {host.name} true` work without questions (ssh-copy-id, "
                        "known_hosts), and have the same Python environment at the same path",
                        host.name,
                    )
                )
        if sessions:
            results += _each_host(subject, sessions)
            results += _between(subject, sessions)
            results += _together(subject, sessions, results)
    return results


def _settings(subject: Subject) -> dict[str, Any]:
    run = None if subject.run is None else subject.run.as_dict()
    return {"run": run, "folder": str(subject.folder), "quick": subject.quick}


def _each_host(subject: Subject, sessions: Sequence[Session]) -> list[CheckResult]:
    """Let all hosts examine themselves, at the same time."""
    for session in sessions:
        session.send("examine_machine", ranks=session.host.slots, **_settings(subject))
    results = []
    for session in sessions:
        try:
            found = [CheckResult(**entry) for entry in session.receive(SECONDS + 180)]
        except UnreachableError as error:
            found = [CheckResult("machine", "not-run", str(error))]
        results += [replace(result, host=session.host.name) for result in found]
    return results


def _between(subject: Subject, sessions: Sequence[Session]) -> list[CheckResult]:
    """Compare hosts with each other."""
    results = []
    checks: dict[str, Callable[[], CheckResult | list[CheckResult]]] = {
        "slots": lambda: between.check_slots(sessions),
        "same versions": lambda: between.check_same_versions(sessions),
        "clock skew": lambda: between.check_clocks(sessions),
        "ports": lambda: between.check_ports(sessions),
        "shared folder": lambda: between.check_shared_folder(sessions, subject.folder.absolute()),
    }
    for name, check in checks.items():
        try:
            found = check()
        except UnreachableError as error:
            found = between.not_run(name, error)
        results += found if isinstance(found, list) else [found]
    return results


def _together(subject: Subject, sessions: Sequence[Session], before: Sequence[CheckResult]) -> list[CheckResult]:
    """Start one job over all hosts."""
    counts = [session.host.slots for session in sessions]
    ranks = sum(counts)
    run = [] if subject.run is None else [check_run(subject.run, ranks)]
    lost = [result.name for result in before if result.name in ("ssh", "ports") and result.status == "fail"]
    if lost:
        return [
            *run,
            *(
                CheckResult(name, "not-run", f"the hosts cannot work together: see {lost[0]}")
                for name in (*NAMES, TRAINING)
            ),
        ]

    def start(module: str, arguments: list[str]) -> list[Ended]:
        master = f"{sessions[0].host.name}:{sessions[0].ask('free_port')}"
        for node, (session, processes) in enumerate(zip(sessions, counts, strict=True)):
            job = {
                "module": module,
                "arguments": arguments,
                "processes": processes,
                "nodes": len(sessions),
                "node": node,
                "master": master,
                "seconds": SECONDS,
            }
            session.send("ranks", job=job)
        return [Ended(**session.receive(SECONDS + 60)) for session in sessions]

    try:
        return run + checks_of_ranks(subject, ranks, start, before)
    except UnreachableError as error:
        return [*run, *(between.not_run(name, error) for name in (*NAMES, TRAINING))]
