"""How a step is started: as a fork or process of this host, on its ranks, or by the launcher of a cluster."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dualtok.commands.run.forks import can_fork, fork, import_for
from dualtok.commands.run.step import SHARED
from dualtok.config.workflow import WorkflowConfig
from dualtok.errors import ConfigError
from dualtok.files import write_text
from dualtok.launch.local import rank_environment, torchrun
from dualtok.launch.start import SCRIPTS, build_start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dualtok.commands.run.step import Step

TICK = 1.0
"""Seconds after which the display is drawn again where a step says nothing."""


def run_step(step: Step, log: Path, show: Callable[[str | None], None]) -> int:
    """Run one step to its end and return its exit status.

    Args:
        step: the step.
        log: file that its output is added to.
        show: called with every line of it, and with None when there was none for a while.

    Raises:
        ConfigError: its launcher is not installed, or cannot start the ranks.
    """
    command = command_of(step)
    reading, writing = os.pipe()
    try:
        if command is None:
            import_for(step.verb)
            process = fork(step.arguments, {**os.environ, "TOKENIZERS_PARALLELISM": "false"}, writing)
        else:
            process = _start(step, command, writing)
    finally:
        os.close(writing)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as copy, os.fdopen(reading, "rb", buffering=0) as stream, _ended_with(process):
        print(f"$ {shlex.join(['dualtok', *step.arguments])}", file=copy, flush=True)
        for line in _lines(stream.fileno()):
            if line is not None:
                copy.write(line + "\n")
                copy.flush()
            show(line)
        _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def command_of(step: Step) -> list[str] | None:
    """Return the program that starts a step, with its arguments; None if it is a fork of this process.

    Raises:
        ConfigError: the launcher's settings are not complete.
    """
    workflow = step.run.workflow or WorkflowConfig()
    if step.verb not in SHARED or workflow.launcher == "none":
        return None if can_fork() else python(step.arguments)
    if workflow.launcher == "torchrun":
        return torchrun(["--standalone"], ranks_of(workflow), "dualtok", list(step.arguments))
    if workflow.launcher == "deepspeed" and step.run.launch.hostfile is None:
        ranks = ["--num_gpus", str(ranks_of(workflow))]
        runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
        return [*runner, *ranks, "--module", "dualtok", *step.arguments]
    return _cluster_command(step, workflow)


def python(arguments: Sequence[str]) -> list[str]:
    """Return the command that starts ``dualtok ARGUMENTS`` as a process of its own."""
    return [sys.executable, "-m", "dualtok", *arguments]


def shown(step: Step) -> str:
    """Return the single command that does what a step does, as a user would type it."""
    workflow = step.run.workflow or WorkflowConfig()
    arguments = list(step.arguments)
    if step.verb not in SHARED or workflow.launcher == "none":
        return shlex.join(["dualtok", *arguments])
    if workflow.launcher == "torchrun":
        return shlex.join(["torchrun", "--nproc-per-node", str(ranks_of(workflow)), "-m", "dualtok", *arguments])
    if workflow.launcher == "deepspeed" and step.run.launch.hostfile is None:
        return shlex.join(["deepspeed", "--num_gpus", str(ranks_of(workflow)), "--module", "dualtok", *arguments])
    sizes = {"--nodes": workflow.nodes, "--gpus": workflow.ranks}
    given = [text for name, value in sizes.items() if value is not None for text in (name, str(value))]
    where = ["--backend", workflow.launcher, *given, "--verb", step.verb]
    return shlex.join(["dualtok", "launch", *where, str(step.run_file), *step.positional, *step.overrides])


def ranks_of(workflow: WorkflowConfig) -> int:
    """Return the ranks of this host: those of the settings, else one per accelerator."""
    if workflow.ranks is not None:
        return workflow.ranks
    if not can_fork():  # there may be accelerators, which torch counts
        import torch  # as late as this, for it takes a second to load

        return max(1, torch.cuda.device_count())
    return 1


def _cluster_command(step: Step, workflow: WorkflowConfig) -> list[str]:
    """Write the launcher's scripts into the step's ``output_dir`` and return what starts them and waits."""
    folder = Path(step.run.output_dir).absolute() / SCRIPTS
    plan = build_start(
        step.run,
        step.run_file,
        step.overrides,
        verb=step.verb,
        backend=workflow.launcher,
        nodes=workflow.nodes,
        gpus=workflow.ranks,
        positional=step.positional,
    )
    if workflow.launcher == "deepspeed" and step.run.launch.deepspeed.remote == "none" and (workflow.nodes or 1) > 1:
        raise ConfigError(
            "launch.deepspeed.remote: 'none' has to be started on every host; use pdsh or ssh, or start the single "
            "steps yourself (`dualtok run RUN --dry-run` prints them)"
        )
    missing = [program for program in plan.needs if shutil.which(program) is None]
    if missing:
        raise ConfigError(f"{missing[0]}: not installed on this host; install it, or choose another workflow.launcher")
    for name, text in plan.files.items():
        write_text(folder / name, text)
    program, *rest = [str(folder / part) if part in plan.files else part for part in plan.command]
    return [program, *(["--wait"] if workflow.launcher == "slurm" else []), *rest]


def _start(step: Step, command: Sequence[str], output: int) -> int:
    workflow = step.run.workflow or WorkflowConfig()
    on_ranks = step.verb in SHARED and workflow.launcher in ("torchrun", "deepspeed")
    variables = rank_environment(ranks_of(workflow)) if on_ranks else {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )
    process.returncode = 0  # waited for by its number, as a fork is
    return process.pid


def _lines(file: int) -> Iterator[str | None]:
    """Yield the lines of a pipe until its other end is closed, and None for each while without any."""
    rest = b""
    while True:
        ready, _, _ = select.select([file], [], [], TICK)
        if not ready:
            yield None
            continue
        piece = os.read(file, 1 << 16)
        if not piece:
            break
        *whole, rest = (rest + piece).replace(b"\r", b"\n").split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace")
    if rest:
        yield rest.decode("utf-8", "replace")


@contextmanager
def _ended_with(process: int) -> Iterator[None]:
    """End a step's whole session when this process is ended, and wait for it: it saves a checkpoint first."""
    try:
        yield
    except BaseException:
        with suppress(ProcessLookupError, ChildProcessError):
            os.killpg(process, signal.SIGTERM)
            os.waitpid(process, 0)
        raise
