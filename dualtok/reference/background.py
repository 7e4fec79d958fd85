"""The reference on host cores, in a process of its own that scores ahead while the model trains (mode ``cpu``).

Two pipes connect the processes, so that the end of either one is seen at once by the other: a worker that fails, or is
killed, stops the training at its next micro-batch; a training that ends in any way ends its worker.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import queue
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dualtok.errors import ConfigError, DualtokError
from dualtok.reference.live import INPUTS, Share, forward_in_pieces, with_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    from dualtok.data.packing import Batch

# Imported where they are used, for what they take to load: transformers (1 to 4 s), and parts of dualtok that need
# it: the worker says first what it cannot do.

START_SECONDS = 600.0
"""Longest time that a worker may take to load its model."""
END_SECONDS = 5.0
"""Time that a worker gets to end before it is killed."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker process needs to know."""

    model: str
    """Folder of the reference model."""
    precision: str
    batch_size: int
    """Most blocks per forward pass."""
    threads: int
    cores: tuple[int, ...] | None = None
    """Host cores it is pinned to; None leaves it where the training process runs."""
    trust_remote_code: bool = False
    """Run Python code that the model brings."""


class BackgroundReference:
    """A :class:`~dualtok.reference.live.LiveReference` in a process of its own.

    Args:
        settings: the worker's model and cores.
        prefetch: micro-batches that are scored ahead of the one in training.
        share: which rows of each micro-batch this rank's worker scores.
        on_forward: called with start and end (``time.monotonic``, seconds) of each of the worker's forward passes.

    Raises:
        ConfigError: the model cannot be loaded, or the cores cannot be had.
        DualtokError: the worker died.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        prefetch: int,
        share: Share | None = None,
        on_forward: Callable[[float, float], None] | None = None,
    ) -> None:
        self._prefetch = prefetch
        self._share = share or Share()
        self._on_forward = on_forward
        self._next_ticket = 0
        self._ready: dict[int, torch.Tensor] = {}
        self._abandoned: set[int] = set()
        context = multiprocessing.get_context("spawn")
        their_requests, self._requests = context.Pipe(duplex=False)
        self._results, their_results = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_work, args=(settings, their_requests, their_results), name="dualtok-reference", daemon=True
        )
        self.process.start()
        their_requests.close()  # the worker's ends must be open in the worker alone, or its death would go unseen
        their_results.close()
        self._receive(START_SECONDS)

    def scored(self, batches: Iterator[Batch], window: int) -> Iterator[Batch]:
        """Yield the batches in order with their losses, of which ``prefetch`` are in the making meanwhile.

        One micro-batch at a time, whatever the window: the queue is what is bounded.
        """
        waiting: deque[tuple[int, Batch]] = deque()
        try:
            for batch in batches:
                waiting.append((self._submit(batch), batch))
                if len(waiting) > self._prefetch:
                    yield self._finish(*waiting.popleft())
            while waiting:
                yield self._finish(*waiting.popleft())
        finally:
            self._abandon([ticket for ticket, _ in waiting])

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Return the reference losses of one batch, after those that are in the making."""
        return self._collect(self._submit(batch), batch)

    def close(self) -> None:
        """End the worker, wherever it stands."""
        self._requests.close()
        self._results.close()
        self.process.terminate()
        self.process.join(END_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(END_SECONDS)

    def _submit(self, batch: Batch) -> int:
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        rows = self._share.take([batch])
        try:
            self._requests.send((ticket, *(rows[name].numpy() for name in INPUTS)))
        except OSError:
            raise self._death() from None
        return ticket

    def _finish(self, ticket: int, batch: Batch) -> Batch:
        return with_reference(batch, self._collect(ticket, batch))

    def _collect(self, ticket: int, batch: Batch) -> torch.Tensor:
        if not self.process.is_alive():  # even if it left results behind: stop at once, not when they are used up
            raise self._death()
        while ticket not in self._ready:
            number, losses, started, ended = self._receive(None)
            if self._on_forward is not None:
                self._on_forward(started, ended)
            if number in self._abandoned:
                self._abandoned.remove(number)
            else:
                self._ready[number] = torch.from_numpy(losses)
        return self._share.join(self._ready.pop(ticket), [batch])[0]

    def _abandon(self, tickets: list[int]) -> None:
        """Forget batches that nobody will ask for any more."""
        for ticket in tickets:
            if self._ready.pop(ticket, None) is None:
                self._abandoned.add(ticket)

    def _receive(self, timeout: float | None) -> Any:
        """Return the worker's next message, or raise what ended it."""
        if timeout is not None and not self._results.poll(timeout):
            self.close()
            raise DualtokError(f"reference.mode cpu: the worker did not load its model within {timeout:.0f} s")
        try:
            message = self._results.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(message, DualtokError):
            self.close()
            raise message
        return message

    def _death(self) -> DualtokError:
        """Return the error that says how the worker ended; the last thing that it sent may be its traceback."""
        try:
            while self._results.poll():
                message = self._results.recv()
                if isinstance(message, DualtokError):
                    return message
        except (EOFError, OSError):
            pass
        self.process.join(END_SECONDS)
        code = self.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        hint = "; was the host out of memory?" if code == -9 else ""
        return DualtokError(
            f"reference.mode cpu: the background worker (process {self.process.pid}) {how}{hint}; resume from the "
            "last checkpoint"
        )


def _work(settings: WorkerSettings, requests: Connection, results: Connection) -> None:
    """Run a worker: load, report, then answer requests in their order until the other side closes."""
    try:
        forward = _load(settings)
        results.send("ready")
        inbox: queue.Queue[Any] = queue.Queue()
        # A thread empties the pipe, so that the training process never waits in `send` for a forward pass to end.
        threading.Thread(target=_read_ahead, args=(requests, inbox), daemon=True).start()
        while (request := inbox.get()) is not None:
            ticket, *arrays = request
            batch = {name: torch.from_numpy(array) for name, array in zip(INPUTS, arrays, strict=True)}
            started = time.monotonic()
            losses = forward(batch)
            results.send((ticket, losses.numpy(), started, time.monotonic()))
    except (BrokenPipeError, KeyboardInterrupt):
        return  # the training process ended
    except BaseException as error:
        results.send(error if isinstance(error, DualtokError) else _as_user_error())
        raise SystemExit(1) from None


def _as_user_error() -> DualtokError:
    return DualtokError(f"reference.mode cpu: the background worker failed: {traceback.format_exc().strip()}")


def _read_ahead(requests: Connection, inbox: queue.Queue[Any]) -> None:
    try:
        while True:
            inbox.put(requests.recv())
    except (EOFError, OSError):
        inbox.put(None)


def _load(settings: WorkerSettings) -> Callable[[Batch], torch.Tensor]:
    """Pin the process, load the model and return its forward pass."""
    if settings.cores is not None:
        try:
            os.sched_setaffinity(0, settings.cores)
        except (AttributeError, OSError) as error:
            raise ConfigError(
                f"reference.cores: {list(settings.cores)} cannot be used on this host ({error}); choose among "
                f"{sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 'none: it cannot pin'}"
            ) from None
    torch.set_num_threads(settings.threads)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    from dualtok.model.load import load_causal_lm
    from dualtok.model.losses import TokenLossModel, check_batch, require_faithful

    causal_lm = load_causal_lm(
        settings.model, precision=settings.precision, trust_remote_code=settings.trust_remote_code
    )
    model = TokenLossModel(causal_lm).eval()
    checked = False

    @torch.no_grad()
    def forward(batch: Batch) -> torch.Tensor:
        nonlocal checked
        if not checked:
            require_faithful(model(check_batch(batch), check=True), settings.precision, type(model.causal_lm).__name__)
            checked = True
        return forward_in_pieces(model, batch, settings.batch_size)

    return forward


def share_cores(cores: tuple[int, ...] | None, local_rank: int, local_ranks: int) -> tuple[int, ...] | None:
    """Return the cores of one rank's worker, given those of all workers of its host.

    Raises:
        ConfigError: they cannot be shared evenly.
    """
    if cores is None:
        return None
    if len(cores) % local_ranks:
        raise ConfigError(
            f"reference.cores: lists {len(cores)} cores, which the {local_ranks} ranks of a host cannot share evenly; "
            f"list a multiple of {local_ranks}"
        )
    each = len(cores) // local_ranks
    return cores[local_rank * each : (local_rank + 1) * each]
