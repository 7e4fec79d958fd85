"""Who works on a run, and how each rank ended: a run's folder alone tells whether it is alive and why it ended.

<output_dir>/job/started.json      written by rank 0 when the job has passed its checks
<output_dir>/job/rank-00003.json   written by rank 3 when it ends by itself; one that is killed writes nothing
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import psutil

from dualtok.errors import ConfigError, DualtokError, Preempted
from dualtok.files import write_text

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from dualtok.distributed.ranks import Ranks

FOLDER, STARTED = "job", "started.json"
Outcome = Literal["finished", "preempted", "error", "bug", "hung", "lost_host"]


@dataclass(frozen=True)
class Started:
    """The job that trains, or trained last."""

    time: float
    """Seconds since 1970, by the clock of rank 0's host."""
    host: str
    pid: int
    process_started: float
    """When rank 0's process started: tells it from a later one with the same number."""
    world_size: int
    total_steps: int

    def is_alive(self) -> bool | None:
        """Return whether rank 0's process is there; None on another host, which cannot see it."""
        if self.host != socket.gethostname():
            return None
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.process_started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended."""

    time: float
    rank: int
    outcome: Outcome
    message: str


class JobRecord:
    """Keeps the record of one job while it is entered; nothing is written before :meth:`begin`.

    Args:
        output: the run's ``output_dir``.
        ranks: the whole job.
    """

    def __init__(self, output: Path, ranks: Ranks) -> None:
        self._folder, self._ranks, self._begun = output / FOLDER, ranks, False

    def begin(self, total_steps: int) -> None:
        """Take the run's folder over from the job before; every rank takes part."""
        self._ranks.first_does(lambda: self._take_over(total_steps))
        self._begun = True

    def _take_over(self, total_steps: int) -> None:
        self._refuse_a_second_job()  # one may have begun since
        shutil.rmtree(self._folder, ignore_errors=True)
        process = psutil.Process()
        started = Started(
            time.time(), socket.gethostname(), process.pid, process.create_time(), self._ranks.world_size, total_steps
        )
        write_text(self._folder / STARTED, json.dumps(asdict(started)))

    def __enter__(self) -> JobRecord:
        """Make sure that no other job writes into the folder; every rank takes part.

        Raises:
            ConfigError: one does on this host; ranks that outlive their launcher go on.
        """
        self._ranks.first_does(self._refuse_a_second_job)
        return self

    def _refuse_a_second_job(self) -> None:
        started = read_started(self._folder.parent)
        ended = any(end.rank == 0 for end in read_ends(self._folder.parent))
        if started is not None and not ended and started.pid != os.getpid() and started.is_alive():
            raise ConfigError(
                f"output_dir {self._folder.parent}: another job still trains there, rank 0 is process {started.pid} on "
                f"this host; wait for its end, or end it (kill {started.pid}), or choose another output_dir"
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Write how this rank ended."""
        if not self._begun:
            return
        outcome: Outcome = "bug"
        if error is None:
            outcome = "finished"
        elif isinstance(error, Preempted):
            outcome = "preempted"
        elif isinstance(error, DualtokError | OSError):
            outcome = "error"
        name = "" if error is None or isinstance(error, DualtokError | Preempted) else f"{type(error).__name__}: "
        write_end(self._folder.parent, self._ranks.rank, outcome, name + " ".join(str(error or "").split()))


def write_end(output: Path, rank: int, outcome: Outcome, message: str) -> None:
    """Note how a rank ends. A folder that cannot be written must not hide why it ends."""
    end = RankEnd(time.time(), rank, outcome, message[:2000])
    try:
        write_text(output / FOLDER / f"rank-{rank:05d}.json", json.dumps(asdict(end)))
    except OSError:
        return


def read_started(output: Path) -> Started | None:
    """Return the record of the last job; None if there is none or it cannot be read."""
    try:
        return Started(**json.loads((output / FOLDER / STARTED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def read_ends(output: Path) -> list[RankEnd]:
    """Return how the ranks of the last job ended, those that said so, the first first."""
    ends = []
    for file in (output / FOLDER).glob("rank-*.json"):
        try:
            ends.append(RankEnd(**json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(ends, key=lambda end: (end.time, end.rank))
