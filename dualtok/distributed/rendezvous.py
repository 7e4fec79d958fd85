"""How the ranks of a job find each other, whoever started them."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from dualtok.distributed.network import free_port, own_address
from dualtok.errors import ConfigError, print_to_stderr

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# Imported where they are used, for they need not be installed or wanted: mpi4py.

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
STORE_PORT = "dualtok/store-port"
"""Key in torchrun's store."""
VERDICT = "dualtok/verdict"
"""Key in rank 0's store: what is wrong, or nothing when all ranks have come."""
NOTICE_SECONDS = 60.0
"""After which rank 0 first says whom it waits for."""
VERDICT_SECONDS = 2.0
ANY_PORT = "0"
"""The store takes whichever is free: one that was looked for before may be another job's by then."""


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
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ANY_PORT}


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
    endpoint = (
        environment.get("MASTER_ADDR") or own_address(environment),
        environment.get("MASTER_PORT") or str(free_port()),
    )
    address, port = world.bcast(endpoint)
    answers = {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(host.rank),
        "LOCAL_WORLD_SIZE": str(host.size),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    MPI.Finalize()  # mpirun calls it a failure if a rank ends without it, and ranks end in several places
    return answers


def join_rendezvous(rank: int, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """Wait until all ranks of the job are there, and say which are not while it takes long.

    Under torchrun, rank 0 holds a new store at each start, and leaves its port in the agent's. torch 2.13 would take
    the agent's own for a new one at each restart of the ranks, but it is that of the start before: they would read the
    addresses of dead processes, and wait for them for ever. A restart has no name that all hosts know (each agent
    counts its own). A port that a start before has left belongs to a process that has ended, and refuses connections.

    Returns:
        The store that rank 0 holds, for the process group.

    Raises:
        ConfigError: rank 0 does not answer, ranks are missing when the time is over, the port is taken, or another
            process has come as this rank.
    """
    if rank == 0:
        store = _open(timeout)
    else:
        try:
            store = connect_store(_address(timeout), timeout)
        except (OSError, RuntimeError) as error:  # torch's errors of stores are RuntimeErrors
            raise ConfigError(
                f"waited {timeout.total_seconds() / 60:g} minutes for rank 0 at {os.environ['MASTER_ADDR']}: "
                f"{str(error).splitlines()[0]}. Has that host started its ranks, and can this one reach it? "
                "`dualtok doctor --hosts` looks"
            ) from None
    _announce(store, rank)
    problem = _count(store, world_size, timeout) if rank == 0 else _verdict(store, timeout)
    if problem:
        raise ConfigError(problem)
    return store


def _under_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _agent_store(timeout: timedelta) -> dist.TCPStore:
    """Connect to the store of torchrun's agent."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def _open(timeout: timedelta) -> dist.TCPStore:
    """Return the store that rank 0 holds."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if _under_torchrun():
        store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        _agent_store(timeout).set(STORE_PORT, str(store.port))
        return store
    try:
        store = dist.TCPStore(host, port, is_master=True, timeout=timeout, wait_for_workers=False)
        os.environ["MASTER_PORT"] = str(store.port)
        return store
    except RuntimeError as error:
        raise ConfigError(
            f"MASTER_PORT: rank 0 cannot open port {port} of {host} ({str(error).splitlines()[0]}); another job may "
            "hold it, choose a free one"
        ) from None


def _address(timeout: timedelta) -> Callable[[], tuple[str, int]]:
    """Return what tells where rank 0's store is."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not _under_torchrun():
        return lambda: (host, port)
    agent = _agent_store(timeout)
    return lambda: (host, int(agent.get(STORE_PORT)))


def _announce(store: dist.TCPStore, rank: int) -> None:
    """Tell the others that this rank is there.

    Raises:
        ConfigError: another process has said so before.
    """
    own = f"{socket.gethostname()} (process {os.getpid()})"
    first = store.compare_set(_key(rank), "", own).decode()
    if first != own:
        raise ConfigError(
            f"{first} has come as rank {rank} before this process: another job meets at the same MASTER_ADDR and "
            "MASTER_PORT, or ranks of an earlier start still live; end those, or choose another port"
        )


def _verdict(store: dist.TCPStore, timeout: timedelta) -> str:
    """Wait until rank 0 says that all have come; return what is wrong, or nothing."""
    store.set_timeout(timeout + timedelta(seconds=10 * VERDICT_SECONDS))  # rank 0 says who is missing, not this one
    try:
        return store.get(VERDICT).decode()
    except RuntimeError:
        return "rank 0 ended, or was cut off, before all ranks had come; see what it said"
    finally:
        store.set_timeout(timeout)


def _count(store: dist.TCPStore, world_size: int, timeout: timedelta) -> str:
    """Wait on rank 0 until all ranks have come, and tell the others; return who is missing at the end, or nothing."""
    started, patience, problem = time.monotonic(), NOTICE_SECONDS, ""
    missing = list(range(world_size))
    while missing and not problem and not store.check([_key(rank) for rank in missing]):
        waited = time.monotonic() - started
        if waited > min(patience, timeout.total_seconds()):
            missing = [rank for rank in missing if not store.check([_key(rank)])]
            here = sorted({store.get(_key(rank)).decode().split()[0] for rank in set(range(world_size)) - set(missing)})
            situation = (
                f"{len(missing)} of {world_size} ranks have not come within {waited:.0f} s: {_some(missing)}; here are "
                f"those of {_some(here)}. See what the launcher says of the other hosts"
            )
            if waited > timeout.total_seconds() and missing:
                problem = situation
            elif missing:
                print_to_stderr(f"dualtok: {situation}; still waiting")
                patience *= 2
        time.sleep(0.05)
    store.set(VERDICT, problem)
    if problem:
        time.sleep(VERDICT_SECONDS)  # the others read it before the store goes
    return problem


def _key(rank: int) -> str:
    return f"dualtok/came/{rank}"


def _some(values: Sequence[object], most: int = 8) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more


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
