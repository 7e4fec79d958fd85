"""What the terminal shows: a progress bar on a terminal, plain lines elsewhere, on one rank only."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from types import TracebackType


class RunProgress:
    """Progress of one piece of work.

    Args:
        title: what is being done.
        total: its length, in the unit that :meth:`advance` counts; None when nobody knows.
        active: False on every rank but one.
        plain_every: units between two plain lines when the output is not a terminal.
        start: units done before, when a run is resumed.
    """

    def __init__(
        self, title: str, total: int | None, *, active: bool = True, plain_every: int = 1, start: int = 0
    ) -> None:
        self._title, self._total, self._done = title, total, start
        self._plain_every = max(1, plain_every)
        self._active = active
        self._started, self._start = time.monotonic(), start
        self._bar: Progress | None = None
        console = Console(file=sys.stderr)
        if active and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, completed=start, detail="")

    def __enter__(self) -> RunProgress:
        """Start drawing."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stop drawing."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, units: int = 1, detail: str = "") -> None:
        """Report finished units; ``detail`` is shown beside the bar, e.g. loss and tokens/s."""
        before, self._done = self._done, self._done + units
        if not self._active:
            return
        if self._bar is not None:
            self._bar.update(self._task, advance=units, detail=detail)
        elif self._done // self._plain_every > before // self._plain_every or self._done == self._total:
            of_total = "" if self._total is None else f"/{self._total}"
            self._line(" ".join(filter(None, [f"{self._title} {self._done}{of_total}", detail, self._time_left()])))

    def rewind(self, done: int) -> None:
        """Go back to ``done`` units."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        if self._active:
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            else:
                self._line(text)

    def _line(self, text: str) -> None:
        print(text.rstrip(), file=sys.stderr, flush=True)

    def _time_left(self) -> str:
        if self._total is None:
            return ""
        spent, done = time.monotonic() - self._started, self._done - self._start
        seconds = int(spent / max(done, 1) * max(self._total - self._done, 0))
        return f"{seconds // 60}:{seconds % 60:02d} left"
