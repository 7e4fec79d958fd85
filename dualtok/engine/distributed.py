"""The ranks of a job: joined once, then only ever used through a few named collectives."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from dualtok.engine.jit_locks import clear_the_way
from dualtok.errors import ConfigError, DualtokError
from dualtok.network import check_interfaces, own_address

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Result = TypeVar("Result")
SHARED_MEMORY = Path("/dev/shm")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
STORE_PORT = "dualtok/store-port"
"""Key in torchrun's store."""


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of the job, or of one group of them."""

    rank: int
    """Place in the group, from 0."""
    world_size: int
    """Ranks in the group."""
    device: torch.device
    group: dist.ProcessGroup | None = None
    """The group that the collectives run over; None is the whole job."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and talks to the terminal."""
        return self.rank == 0

    def gather(self, values: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Concatenate 1-D tensors of different lengths in rank order.

        Args:
            values: this rank's values [n_local], any n_local including 0.

        Returns:
            The values of all ranks [n], and this rank's offset in them: what ``dual_loss(gather=...)`` takes.
        """
        if self.world_size == 1:
            return values, 0
        length = torch.tensor([len(values)], device=values.device)
        lengths = [torch.empty_like(length) for _ in range(self.world_size)]
        dist.all_gather(lengths, length, group=self.group)
        counts = [int(count) for count in torch.cat(lengths)]
        longest = max(counts)
        padded = values.new_zeros(longest)
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]), sum(counts[: self.rank])

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks of a small tensor (a copy; the argument is left alone)."""
        total = values.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total, group=self.group)
        return total

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's small picklable value, in rank order."""
        if self.world_size == 1:
            return [value]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, value, group=self.group)
        return everyone

    def gather_objects_to_first(self, value: Any) -> list[Any] | None:
        """Return every rank's picklable value, in rank order, on rank 0 and None elsewhere."""
        if self.world_size == 1:
            return [value]
        everyone: list[Any] | None = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, everyone, group=self.group, group_dst=0)
        return everyone

    def from_first(self, value: Any) -> Any:
        """Return rank 0's value of a small picklable object on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier(group=self.group)

    def together(self, action: Callable[[], Result]) -> Result:
        """Run ``action()`` on every rank; a user's error on one of them is raised on all, so that none waits for it."""
        problem: DualtokError | None = None
        try:
            result = action()
        except DualtokError as error:
            if self.world_size == 1:
                raise
            problem = error
        for found in self.gather_objects(problem):
            if found is not None:
                raise found
        return result

    def first_does(self, action: Any) -> Any:
        """Run ``action()`` on rank 0 and return its result everywhere; an error on rank 0 is raised on every rank."""
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_first:
            try:
                outcome = (action(), None)
            except Exception as error:
                if self.world_size == 1:
                    raise
                outcome = (None, error)
        result, failure = self.from_first(outcome)
        if failure is not None:
            raise failure
        return result


ALONE = Ranks(0, 1, torch.device("cpu"))
"""A job of one process that has joined nothing."""


def complete_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a plain start, without a launcher, lacks: a job of one process on this host.

    Raises:
        ConfigError: a launcher set only some of its variables, or MPI started the ranks and mpi4py is not there.
    """
    present = [name for name in LAUNCHER_VARIABLES if name in environment]
    if len(present) == len(LAUNCHER_VARIABLES):
        return {}
    by_pmix = "PMIX_RANK" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    if by_pmix or any(int(environment.get(name, "1")) > 1 for name in MPI_VARIABLES):
        return ask_mpi(environment)
    if "WORLD_SIZE" in environment and int(environment["WORLD_SIZE"]) > 1:
        missing = sorted(set(LAUNCHER_VARIABLES) - set(present))
        raise ConfigError(f"WORLD_SIZE is set but {', '.join(missing)} is not; start with torchrun or deepspeed")
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise ConfigError(
            f"srun started {environment['SLURM_STEP_NUM_TASKS']} tasks but RANK is not set, so each would train alone; "
            "start one torchrun per host, set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or use "
            "`srun --mpi=pmix` with mpi4py; `dualtok launch --backend slurm` writes such a job"
        )
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}


def ask_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the launcher's variables as MPI knows them, through mpi4py; every rank must call it.

    As ``deepspeed.comm.mpi_discovery`` does (0.19.8), but that takes the first address that ``hostname -I`` lists,
    whichever network it is of, and always port 29500, which two jobs of a host cannot share.

    Raises:
        ConfigError: mpi4py is not installed, or this host lacks the interface that gloo or NCCL shall use.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no MPI library
        raise ConfigError(f"MPI started this rank, but mpi4py cannot be used ({error}); pip install mpi4py") from None
    world = MPI.COMM_WORLD
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    place = (environment.get("MASTER_ADDR") or own_address(environment), environment.get("MASTER_PORT") or _free_port())
    address, port = world.bcast(place)
    answers = {"RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(host.rank),
               "LOCAL_WORLD_SIZE": str(host.size), "MASTER_ADDR": address, "MASTER_PORT": port}  # fmt: skip
    MPI.Finalize()  # mpirun calls it a failure if a rank ends without it, and ranks end in several places
    return answers


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def join_ranks(timeout_minutes: float = 30.0) -> Ranks:
    """Join the process group that the launcher describes (torchrun, ``deepspeed``, MPI), or start a job of one rank."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    check_interfaces(os.environ)
    os.environ.update(complete_environment(os.environ))
    if "LOCAL_WORLD_SIZE" in os.environ:
        # Where DeepSpeed's CPU operators find LOCAL_SIZE equal to the world size they look for the shared memory of all
        # ranks, and spin for ever if some are on another host.
        os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        clear_the_way()
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        _join_under_torchrun(get_accelerator().communication_backend_name(), timeout)
        deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False, timeout=timeout)
    accelerator = get_accelerator()
    device = torch.device(accelerator.device_name(int(os.environ.get("LOCAL_RANK", "0"))))
    if device.type != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        device = torch.device("cpu")
        _unlink_shared_buffer()
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _join_under_torchrun(backend: str, timeout: timedelta) -> None:
    """Join the process group of a job under torchrun through a store of this start's own.

    torch 2.13 takes the agent's store for a new one at each restart of the ranks, but it is that of the start before:
    ranks would read the addresses of dead processes, and wait for them for ever. A restart has no name that all hosts
    know (each agent counts its own). So rank 0 holds a new store, and leaves its port in the agent's; a port that a
    start before has left belongs to a process that has ended, and refuses connections.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host = os.environ["MASTER_ADDR"]
    agent = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout,
                          wait_for_workers=False)  # fmt: skip
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        agent.set(STORE_PORT, str(store.port))
    else:
        store = connect_store(lambda: (host, int(agent.get(STORE_PORT))), timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def connect_store(address: Callable[[], tuple[str, int]], timeout: timedelta) -> dist.TCPStore:
    """Connect to a store as soon as there is one.

    torch's own attempts print stacks for each refused connection; a plain socket asks first.

    Args:
        address: returns the host and port to try next.
        timeout: of the attempts together, and of the store's operations.

    Raises:
        OSError: nobody listens, or nothing answers.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        host, port = address()
        try:
            socket.create_connection((host, port), timeout=max(0.1, min(5.0, timeout.total_seconds()))).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(min(0.2, timeout.total_seconds() / 10))
    return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def _unlink_shared_buffer() -> None:
    """Take away the name of this rank's buffer of DeepSpeed's all-reduce on CPUs, which every rank has mapped by now.

    DeepSpeed 0.19.8 never does: each job would leave 69 MB per rank in /dev/shm, that is in memory, for good. Without
    a name the buffer goes with the last process that maps it, even if that one is killed.
    """
    dist.barrier()
    job = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    (SHARED_MEMORY / f"deepspeed_allreduce_buffer_{job}_{dist.get_rank()}").unlink(missing_ok=True)


def leave_ranks() -> bool:
    """Wait for the other ranks, then leave the process group; returns whether this process was in one.

    Rank 0 holds the store that the others use until the end, so that it must not go first.
    """
    if not dist.is_initialized():
        return False
    dist.barrier()
    dist.destroy_process_group()
    return True
