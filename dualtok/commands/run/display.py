"""What ``dualtok run`` shows: step k of n, the time left, and the latest line of the step that is running."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from dualtok.launch.local import is_progress

if TYPE_CHECKING:
    from rich.progress import Progress

    from dualtok.commands.run.step import Step

# Imported where they are used, for what they take to load: rich (.1 s).

WIDEST_DETAIL = 60
COUNTING = ("prepare: ", "train ", "score ", "audit ")
"""How lines begin that say how far a step is."""
PAUSE = 2.0
"""Seconds between two of them."""


class Display:
    """One display of all steps: a bar on a terminal, lines elsewhere.

    Nothing is drawn by a thread of its own: the process that draws is also forked.
    """

    def __init__(self, steps: int) -> None:
        self._steps, self._started = steps, time.monotonic()
        self._bar: Progress | None = None
        self._title = ""
        self._latest = 0.0

    def __enter__(self) -> Display:
        """Begin to draw, where there is a terminal."""
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[detail]}"))
            self._bar = Progress(*columns, auto_refresh=False)
            self._task = self._bar.add_task("", total=self._steps, detail="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        if self._bar is not None:
            self._bar.stop()

    def begin(self, number: int, step: Step, left: float | None) -> None:
        """Show the step that begins.

        Args:
            number: from 1.
            step: the step.
            left: seconds that it and the steps after it will take; None where nothing is known.
        """
        spent = f"{(time.monotonic() - self._started) / 60:.1f} min"
        about = "" if left is None else f"; about {in_words(left)} left"
        self._title = f"[{number}/{self._steps}] {step.title}"
        self.line(f"{self._title} ({spent}{about})")
        self._draw(number - 1, "")

    def skip(self, number: int, step: Step) -> None:
        """Show a step that was done before."""
        self.line(f"[{number}/{self._steps}] {step.title}: done before")
        self._draw(number, "")

    def detail(self, step: Step, line: str | None) -> None:
        """Show a line of the step that is running, if it is one for people; None draws anew.

        Without a terminal, of the lines that count something one in :data:`PAUSE` seconds.
        """
        if line is None:
            self._draw(None, None)
        elif line.startswith(COUNTING):
            if self._bar is not None:
                self._draw(None, line.strip()[:WIDEST_DETAIL])
            elif time.monotonic() - self._latest >= PAUSE:
                self._latest = time.monotonic()
                self.line(f"  {line.rstrip()}")
        elif step.verb == "prepare" or is_progress(line):
            self.line(f"  {line.rstrip()}")

    def line(self, text: str) -> None:
        """Print a line of its own."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def _draw(self, done: int | None, detail: str | None) -> None:
        if self._bar is None:
            return
        changes = {} if detail is None else {"detail": detail}
        self._bar.update(self._task, completed=done, description=self._title, **changes)  # type: ignore[arg-type]
        self._bar.refresh()


def in_words(seconds: float) -> str:
    """Return a duration as one would say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
