"""Settings of ``dualtok launch``: how the ranks of a run are started on the hosts of a cluster."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Word = Annotated[str, Field(pattern=r"^[^\s'\"]+$")]
"""A name or path that stands in a script or a directive as it is."""
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


@dataclass(config=ConfigDict(extra="forbid"))
class TorchrunConfig:
    """The rendezvous at which torchrun's hosts meet, again after each restart."""

    last_call_seconds: Annotated[int, Field(ge=1)] = 30
    """How long ``min_nodes`` hosts that have come wait for the others. Default: torch's own."""

    read_seconds: Annotated[int, Field(ge=1)] = 60
    """How long a host waits for the rendezvous's answer. Default: torch's own."""


@dataclass(config=ConfigDict(extra="forbid"))
class DeepSpeedLaunchConfig:
    """How DeepSpeed's launcher reaches the hosts of the hostfile."""

    remote: Literal["pdsh", "ssh", "none"] = "pdsh"
    """``pdsh`` and ``ssh`` start all hosts from here; with ``none`` the command is given on every host."""


@dataclass(config=ConfigDict(extra="forbid"))
class SlurmConfig:
    """The job that ``sbatch`` gets."""

    start: Literal["ranks", "torchrun", "mpi"] = "ranks"
    """``srun`` starts the ranks themselves, one torchrun per host, or ranks that ask MPI who they are."""

    time: Word = "24:00:00"
    """Time limit, in Slurm's notation; the run is warned before it and queued again."""

    partition: Word | None = None
    """Partition; without it the cluster's default."""

    account: Word | None = None
    """Account; without it the user's default."""

    gres: Word | None = "gpu"
    """Slurm's name of the accelerator, of which a host needs one per rank; null on hosts without one."""

    mpi: Word = "pmix"
    """Only with ``start: mpi``: the plugin of ``srun --mpi``."""

    options: tuple[Word, ...] = ()
    """Further options of ``sbatch``, e.g. ``--constraint=h100``."""


@dataclass(config=ConfigDict(extra="forbid"))
class KubernetesConfig:
    """The job that Kubeflow's training operator gets."""

    kind: Literal["PyTorchJob", "MPIJob"] = "PyTorchJob"
    """``PyTorchJob`` runs torchrun in every pod, ``MPIJob`` starts ranks from a launcher pod."""

    image: Word = "dualtok:latest"
    """Container image with dualtok; for an MPIJob also Open MPI and mpi4py."""

    namespace: Word = "default"
    """Namespace of the job."""

    claim: Word = "dualtok"
    """Persistent volume claim that all pods can write (ReadWriteMany): data, run files and output."""

    folder: Annotated[str, Field(pattern=r"^/[^\s'\"]*$")] = "/work"
    """Where the claim is mounted; the run file's paths are read from there."""

    resource: Word | None = "nvidia.com/gpu"
    """The accelerator as the cluster names it; null on hosts without one."""

    shared_memory: Word = "16Gi"
    """Size of ``/dev/shm``, through which the ranks of a host talk; a container's own 64 MB are too few."""


@dataclass(config=ConfigDict(extra="forbid"))
class LaunchConfig:
    """Hosts, network, caches, logs and restarts; each backend reads what concerns it."""

    hostfile: Word | None = None
    """Lines ``HOST slots=RANKS`` for the backends ``deepspeed`` and ``mpi``; all hosts with equally many slots."""

    interface: Word | None = None
    """Network interface for NCCL, gloo and MPI, e.g. ``eth0`` or ``ib0``; without it the libraries choose."""

    master: Word | None = None
    """Host of rank 0, as the others can resolve it; needed by ``torchrun`` and ``deepspeed`` without ssh on several
    hosts, otherwise the first host."""

    port: Annotated[int, Field(ge=1024, le=65535)] = 29500
    """Port of the rendezvous on that host. Slurm's jobs take one that follows from their number, MPI's a free one.
    Unit: none."""

    min_nodes: Annotated[int, Field(ge=1)] | None = None
    """Train on with so few hosts when others are lost; without it the job waits for all. For the backends ``torchrun``
    and, over pdsh or ssh, ``deepspeed``, and for a ``PyTorchJob``. Unit: hosts."""

    cache_dir: Word | None = None
    """Folder on each host's own disk for compiled operators, kernels and downloads; without it below ``$TMPDIR``."""

    restarts: Annotated[int, Field(ge=0)] = 3
    """How often a failed job goes on from its last checkpoint by itself. Unit: restarts."""

    stop_seconds: Annotated[int, Field(ge=1)] = 300
    """How long ranks may take for their last step and checkpoint when the job is asked to end; as long before Slurm's
    time limit they are warned."""

    environment: dict[VariableName, str] = dataclasses.field(default_factory=dict)
    """Further variables for every rank. They stand in the scripts, so no secrets."""

    torchrun: TorchrunConfig = dataclasses.field(default_factory=TorchrunConfig)
    """The backend ``torchrun``, and a ``PyTorchJob``."""

    deepspeed: DeepSpeedLaunchConfig = dataclasses.field(default_factory=DeepSpeedLaunchConfig)
    """The backend ``deepspeed``."""

    slurm: SlurmConfig = dataclasses.field(default_factory=SlurmConfig)
    """The backend ``slurm``."""

    k8s: KubernetesConfig = dataclasses.field(default_factory=KubernetesConfig)
    """The backend ``k8s``."""

    def __post_init__(self) -> None:
        """Refuse what has no effect."""
        if self.slurm.mpi != "pmix" and self.slurm.start != "mpi":
            raise ValueError("launch.slurm.mpi: has no effect without launch.slurm.start=mpi; remove it")
