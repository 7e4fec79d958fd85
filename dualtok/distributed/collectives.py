"""Collectives timed as they are waited for, DeepSpeed's and dualtok's own alike.

DeepSpeed's comms logger would make every one of them blocking, and so measure another program than the one that
trains. Here a call counts for as long as it holds up its caller: the whole of a blocking one; of one that runs beside
the computation (``async_op``) the call and the later ``wait()``. What is hidden behind computation costs the step
nothing and is not counted. The time includes waiting for the slowest rank.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dualtok.monitor.timing import COMMUNICATION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dualtok.monitor.timing import PhaseTimer

# Imported where they are used, for what they take to load: DeepSpeed (2 s).

COLLECTIVES = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "inference_all_reduce",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
)
"""Names in torch.distributed and in DeepSpeed's backend. ``send`` and ``recv`` are a pipeline's, which counts them."""


class _Awaited:
    """The handle of a collective under way, whose ``wait`` is counted."""

    def __init__(self, work: Any, timer: PhaseTimer) -> None:
        self._work, self._timer = work, timer

    def wait(self, *arguments: Any, **named: Any) -> Any:
        """Wait for the collective."""
        with self._timer.phase(COMMUNICATION):
            return self._work.wait(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextmanager
def timed_collectives(timer: PhaseTimer) -> Iterator[None]:
    """Count this process's collectives as communication of ``timer`` while the block lasts."""
    import deepspeed.comm.comm as deepspeed_comm

    changed: list[tuple[Any, str, Any]] = []
    for owner in (dist, deepspeed_comm.cdb):  # DeepSpeed keeps functions of torch's that it found at its start
        for name in COLLECTIVES:
            if (function := getattr(owner, name, None)) is not None:
                changed.append((owner, name, function))
                setattr(owner, name, _timed(function, timer))
    try:
        yield
    finally:
        for owner, name, function in changed:
            setattr(owner, name, function)


def _timed(function: Callable[..., Any], timer: PhaseTimer) -> Callable[..., Any]:
    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        with timer.phase(COMMUNICATION):
            work = function(*arguments, **named)
        return _Awaited(work, timer) if hasattr(work, "wait") and not isinstance(work, _Awaited) else work

    return call
