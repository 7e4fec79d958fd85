"""The ranks of a job: joined once, then only ever used through a few named collectives."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from dualtok.distributed.network import check_interfaces
from dualtok.distributed.operators import clear_stale_locks, watch_operators
from dualtok.distributed.rendezvous import complete_environment, join_rendezvous
from dualtok.errors import DualtokError

if TYPE_CHECKING:
    from collections.abc import Callable

# Imported where they are used, for what they take to load: DeepSpeed (2 s).

Result = TypeVar("Result")
SHARED_MEMORY = Path("/dev/shm")


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


def join_ranks(timeout_minutes: float = 30.0) -> Ranks:
    """Join the process group that the launcher describes (torchrun, ``deepspeed``, MPI), or start a job of one rank.

    Args:
        timeout_minutes: for which the ranks wait for each other, here and in collectives.

    Raises:
        ConfigError: the launcher's variables are not complete, or not all ranks have come.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    check_interfaces(os.environ)
    os.environ.update(complete_environment(os.environ))
    if "LOCAL_WORLD_SIZE" in os.environ:
        # Where DeepSpeed's CPU operators find LOCAL_SIZE equal to the world size they look for the shared memory of all
        # ranks, and spin for ever if some are on another host.
        os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        clear_stale_locks()
    watch_operators()
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        backend = get_accelerator().communication_backend_name()
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = join_rendezvous(rank, world_size, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        deepspeed.init_distributed(backend, verbose=False, timeout=timeout)
    accelerator = get_accelerator()
    device = torch.device(accelerator.device_name(int(os.environ.get("LOCAL_RANK", "0"))))
    if device.type != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        device = torch.device("cpu")
        _unlink_shared_buffer()
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _unlink_shared_buffer() -> None:
    """Take away the name of this rank's buffer of DeepSpeed's all-reduce on CPUs, which every rank has mapped by now.

    DeepSpeed 0.19.8 never does: each job would leave 69 MB per rank in /dev/shm, that is in memory, for good (150
    jobs of two ranks filled 21 GB). Without a name the buffer goes with the last process that maps it, even if that one
    is killed.
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
