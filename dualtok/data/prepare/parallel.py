"""Work shared by processes, with results in the order of the items and a bounded number of items in flight."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, TypeVar

from dualtok.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 4


class Workers:
    """A pool of processes; with one process everything runs in this one."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        # Spawned, not forked: tokenizers' and Arrow's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._pool = (
            ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent) if processes > 1 else None
        )

    def __enter__(self) -> Workers:
        """Return the pool."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stop the processes; after an error without waiting for what is queued."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item], *, batch: int = 1) -> Iterator[Result]:
        """Yield ``function(item)`` in the order of the items, ``batch`` items per message to a process.

        Unlike ``Executor.map`` it draws items only as results are taken, so that memory stays flat.

        Raises:
            DataError: a process was killed, e.g. for lack of memory.
        """
        if self._pool is None:
            yield from map(function, items)
            return
        source = iter(items)
        waiting: deque[Future[list[Result]]] = deque()
        try:
            while True:
                while len(waiting) < AHEAD * self._processes and (group := list(islice(source, batch))):
                    waiting.append(self._pool.submit(_apply, function, group))
                if not waiting:
                    return
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(f"a data process died: {error}; use fewer data.processes") from None


def _apply(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [function(item) for item in items]


def _end_with_parent() -> None:
    """Let a worker end when its parent was killed; the pool's own processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
