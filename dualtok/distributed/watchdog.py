"""A rank that hangs ends the job, with the stacks of every rank on disk.

In a hang one rank is stuck and the others wait for it in a collective, each for ever. Every rank watches itself: when
no step has ended for too long it writes the stacks of its threads, says where its main thread stands, and exits; the
launcher then stops the rest.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

from dualtok.distributed.job_record import write_end
from dualtok.errors import print_to_stderr

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

HUNG = 70
"""Exit status of a rank whose watchdog fired."""
GRACE_SECONDS = 5.0
"""Between a rank's report and its end: the others, which noticed a moment later, must get to theirs."""


class Watchdog:
    """Watches the main thread while it is entered.

    Args:
        seconds: longest time between two beats.
        folder: where stacks are written; it lies in the run's ``output_dir``.
        rank: this rank.
    """

    def __init__(self, seconds: float, folder: Path, rank: int) -> None:
        self._seconds, self._path, self._rank = seconds, folder / f"rank-{rank:05d}.txt", rank
        self._last, self._doing = time.monotonic(), "starting"
        self._over = threading.Event()
        self._main = threading.main_thread()

    def beat(self, doing: str) -> None:
        """Report progress; ``doing`` says what comes next."""
        self._last, self._doing = time.monotonic(), doing

    def __enter__(self) -> Watchdog:
        """Begin to watch."""
        self.beat(self._doing)
        threading.Thread(target=self._watch, name="dualtok-watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stop watching."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                try:
                    self._report()
                finally:
                    time.sleep(GRACE_SECONDS)
                    os._exit(HUNG)

    def _report(self) -> None:
        frame = sys._current_frames().get(self._main.ident or 0)
        here = traceback.extract_stack(frame)[-1] if frame is not None else None
        where = "" if here is None else f"; its main thread is in {here.name} ({here.filename}:{here.lineno})"
        silence = f"no progress for {self._seconds:.0f} s while {self._doing}{where}"
        print_to_stderr(
            f"dualtok: error: rank {self._rank}: {silence}; stacks of all threads are in {self._path}. The rank that "
            "waits in no collective is the one to look at; resume from the last checkpoint, or raise "
            "monitor.hang_seconds"
        )
        write_end(self._path.parent.parent, self._rank, "hung", f"{silence}; stacks are in {self._path.parent}")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
