"""Where a rank's time goes: seconds per phase of a training step, always on.

Phases nest, and each second counts once, with the innermost phase: a collective within the forward pass counts as
communication and not as forward. What no phase claims is ``other``, so that the phases sum to the step's wall time.

On host cores the marks between phases are readings of the clock. On an accelerator they are events on the stream that
computes, read after the step: a phase is then the time until that stream reached its end, whatever the host did
meanwhile.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

Item = TypeVar("Item")

DATA, REFERENCE, FORWARD, BACKWARD = "data", "reference", "forward", "backward"
COMMUNICATION, PIPELINE, OPTIMIZER, OTHER = "communication", "pipeline", "optimizer", "other"
PHASES = (DATA, REFERENCE, FORWARD, BACKWARD, COMMUNICATION, PIPELINE, OPTIMIZER, OTHER)
"""``communication``: collectives that the step waits for; ``pipeline``: sending to, receiving from and so waiting for
the neighboring stages."""


class _Clock(Protocol):
    def mark(self) -> Any:
        """Return a mark of now."""

    def between(self, marks: list[Any]) -> list[float]:
        """Return the seconds from each mark to the next."""


class _HostClock:
    mark = staticmethod(time.perf_counter)

    def between(self, marks: list[float]) -> list[float]:
        return [end - begin for begin, end in pairwise(marks)]


class _DeviceClock:
    """Events on the stream that is current when the first one is recorded: DeepSpeed's side streams hide no time."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        self._stream: Any = None
        self._free: list[Any] = []

    def mark(self) -> Any:
        self._stream = self._stream or self._module.current_stream()
        event = self._free.pop() if self._free else self._module.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def between(self, marks: list[Any]) -> list[float]:
        marks[-1].synchronize()
        seconds = [begin.elapsed_time(end) / 1000 for begin, end in pairwise(marks)]
        self._free += marks
        self._stream = None
        return seconds


@dataclass
class StepTimes:
    """Seconds of some optimizer steps together, on one rank."""

    steps: int = 0
    wall: float = 0.0
    """From the steps' beginnings to their ends."""
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By :data:`PHASES`; they sum to ``wall``."""
    busy: float = 0.0
    """Forward and backward passes with the collectives inside them: what a pipeline stage is there for."""


class PhaseTimer:
    """Adds up the phases of one rank's steps.

    Args:
        device: where the rank computes.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._clock: _Clock = _HostClock() if device is None or device.type == "cpu" else _DeviceClock(device)
        self._open: list[str] = []
        """The phases that the rank is in, the innermost last; empty between steps."""
        self._marks: list[Any] = []
        self._entered: list[tuple[str, str]] = []
        """After each mark: the innermost phase, and the innermost one that is not communication."""
        self._times = StepTimes()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one optimizer step."""
        self._enter(OTHER)
        try:
            yield
        finally:
            self._marks.append(self._clock.mark())
            self._close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as a phase; between steps, e.g. in an evaluation, nothing is counted."""
        if not self._open or self._open[-1] == name:
            yield
            return
        self._enter(name)
        try:
            yield
        finally:
            if self._open:
                self._open.pop()
                self._mark()

    def each(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """Yield the items, and count the time that each takes to come as a phase."""
        while True:
            with self.phase(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def take(self) -> StepTimes:
        """Return the times since the last call, and begin anew."""
        taken, self._times = self._times, StepTimes()
        return taken

    def _enter(self, name: str) -> None:
        self._open.append(name)
        self._mark()

    def _mark(self) -> None:
        self._marks.append(self._clock.mark())
        top = self._open[-1]
        around = top if top != COMMUNICATION else next(name for name in reversed(self._open) if name != COMMUNICATION)
        self._entered.append((top, around))

    def _close(self) -> None:
        seconds = self._clock.between(self._marks)
        for (name, around), passed in zip(self._entered, seconds, strict=True):
            self._times.phases[name] += passed
            if around in (FORWARD, BACKWARD):
                self._times.busy += passed
        self._times.wall += sum(seconds)
        self._times.steps += 1
        self._open, self._marks, self._entered = [], [], []
