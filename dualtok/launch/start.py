"""``dualtok launch``: check a run against the hosts it shall get, write the scripts, start them."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dualtok.errors import ConfigError, did_you_mean
from dualtok.files import write_text
from dualtok.launch.deepspeed import deepspeed
from dualtok.launch.hostfile import choose_hosts
from dualtok.launch.job import Job, Start
from dualtok.launch.kubernetes import k8s
from dualtok.launch.mpi import mpi
from dualtok.launch.slurm import slurm
from dualtok.launch.torchrun import torchrun

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dualtok.config.run import RunConfig
    from dualtok.config.train import TrainConfig

# Imported where they are used, for what they take to load: torch (1 s), and parts of dualtok that need it.

BACKENDS: dict[str, Callable[[Job], Start]] = {
    "deepspeed": deepspeed,
    "torchrun": torchrun,
    "slurm": slurm,
    "mpi": mpi,
    "k8s": k8s,
}
SCRIPTS = "launch"
"""Folder within a run's ``output_dir`` for what is written here."""
VERBS = ("train", "score", "audit")
"""Verbs that ranks can share."""


def build_start(
    run: RunConfig,
    run_file: Path,
    overrides: Sequence[str],
    *,
    verb: str,
    backend: str,
    nodes: int | None,
    gpus: int | None,
    positional: Sequence[str] = (),
) -> Start:
    """Return what starts a run on ``nodes`` hosts with ``gpus`` ranks each; nothing is written or started.

    Args:
        run: the run, overrides applied.
        run_file: its file; with Kubernetes a path within the containers, else one that all hosts see.
        overrides: passed on to the verb, but for those of the section ``launch``.
        verb: one of :data:`VERBS`, or another one that ranks can share with its ``positional`` arguments.
        backend: one of :data:`BACKENDS`.
        nodes: hosts; None is all of the hostfile, or one.
        gpus: ranks per host; None is the slots of the hostfile, or as many as this host has accelerators.
        positional: arguments of the verb between the run file and the overrides.

    Raises:
        ConfigError: a name is unknown, the hostfile does not fit, or the ranks cannot share the run's batch.
    """
    if backend not in BACKENDS:
        raise ConfigError(
            f"--backend {backend!r}{did_you_mean(backend, BACKENDS)}: must be one of {', '.join(BACKENDS)}"
        )
    if verb not in VERBS and not positional:
        raise ConfigError(f"--verb {verb!r}{did_you_mean(verb, VERBS)}: must be one of {', '.join(VERBS)}")
    settings = run.launch
    if settings.hostfile is not None and backend in ("deepspeed", "mpi"):
        hosts, gpus = choose_hosts(settings.hostfile, nodes, gpus)
        nodes = len(hosts)
        settings = replace(settings, hostfile=str(Path(settings.hostfile).absolute()))
    nodes, gpus = nodes or 1, gpus or _visible_accelerators()
    if verb == "train":
        check_ranks(run.need("train", "launch"), nodes * gpus)
    if settings.min_nodes is not None:
        _check_fewer(run, verb, backend, settings.min_nodes, nodes=nodes, gpus=gpus)
    passed_on = [text for text in overrides if not text.startswith("launch.")]
    resume = ["--auto-resume"] if verb == "train" else []
    local = backend != "k8s"
    folder = Path(run.output_dir).absolute()
    if local:
        _check_paths(str(Path.cwd()), str(folder), sys.executable)
    job = Job(
        nodes,
        gpus,
        settings,
        arguments=(verb, str(run_file.absolute() if local else run_file), *positional, *passed_on, *resume),
        folder=str(Path.cwd()) if local else None,
        python=sys.executable if local else "python",
        logs=str((folder if local else Path(run.output_dir)) / "logs"),
        scripts=str(folder / SCRIPTS),
        name=_job_name(run.output_dir),
    )
    return BACKENDS[backend](job)


def _check_paths(*paths: str) -> None:
    for path in paths:
        if set(path) & set('"$`\\}\n'):
            raise ConfigError(f"{path!r}: a path with quotes, braces, $ or a backslash cannot stand in a script")


def check_ranks(train: TrainConfig, ranks: int) -> None:
    """Refuse now what the ranks would refuse after a wait in a queue.

    Raises:
        ConfigError: the ranks cannot share the stages of the pipeline, or the batch, evenly.
    """
    if train.engine == "opacus":
        return
    from dualtok.distributed.deepspeed_config import training_config

    stages = 1 if train.pipeline is None else train.pipeline.stages
    if ranks % stages:
        raise ConfigError(
            f"train.pipeline.stages: {stages} stages cannot share {ranks} ranks evenly; change --nodes, --gpus or it"
        )
    training_config(train, ranks // stages)


def _check_fewer(run: RunConfig, verb: str, backend: str, least: int, *, nodes: int, gpus: int) -> None:
    """Refuse ``launch.min_nodes`` where it has no effect, and where the ranks of fewer hosts could not go on."""
    settings = run.launch
    way = {"torchrun": True, "deepspeed": settings.deepspeed.remote != "none", "k8s": settings.k8s.kind == "PyTorchJob"}
    if not way.get(backend, False):
        raise ConfigError(f"launch.min_nodes: has no effect with --backend {backend} started like this; remove it")
    if least > nodes:
        raise ConfigError(f"launch.min_nodes: {least} are more than the {nodes} hosts of the job")
    for fewer in range(least, nodes) if verb == "train" else ():
        try:
            check_ranks(run.need("train", "launch"), fewer * gpus)
        except ConfigError as problem:
            where = f"on {fewer} of {nodes} hosts"
            raise ConfigError(f"launch.min_nodes: {where} the run could not go on: {problem}") from None


def start(plan: Start, folder: Path, *, dry_run: bool) -> None:
    """Print a plan's scripts and command; unless ``dry_run``, write them to ``folder`` and become the command.

    Raises:
        ConfigError: a program that the command needs is not installed.
    """
    command = shlex.join([str(folder / part) if part in plan.files else part for part in plan.command])
    for name, text in plan.files.items():
        print(f"# {folder / name}\n{text}" if dry_run else f"wrote {folder / name}", flush=True)
    print(command, flush=True)
    if plan.note:
        print(f"# {plan.note}", flush=True)
    if dry_run:
        return
    missing = [program for program in plan.needs if shutil.which(program) is None]
    if missing:
        raise ConfigError(f"{missing[0]}: not installed on this host; install it, or choose another --backend")
    for name, text in plan.files.items():
        write_text(folder / name, text)
    arguments = shlex.split(command)
    os.execvp(arguments[0], arguments)


def _visible_accelerators() -> int:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError("--gpus: missing; this host shows no accelerator to count, so give the ranks per host")
    return count


def _job_name(output_dir: str) -> str:
    """Return a name that Slurm, Kubernetes and a rendezvous all take."""
    name = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in Path(output_dir).name.lower())
    return f"dualtok-{name.strip('-')}"[:50].rstrip("-")
