"""Hosts that hear from each other apart from training's collectives, so that a host that is cut off gets named.

When a host goes, every rank hangs in a collective: which one went cannot be seen from there, and a collective's
time-out must be longer than the longest compilation. So the first rank of each host writes a counter into a TCPStore
of rank 0 every few seconds, from a thread and over a connection of its own. Rank 0 watches the counters. All other
ranks watch that rank 0's store answers, and read there whether a host is lost.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch.distributed as dist

from dualtok.distributed.rendezvous import connect_store
from dualtok.errors import ConfigError, print_to_stderr
from dualtok.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from types import TracebackType

    from dualtok.distributed.ranks import Ranks

LOST_HOST = 71
"""Exit status of the ranks of a job that lost a host."""
BEATS = 6
"""Beats within ``monitor.heartbeat_seconds``, at least."""
LONGEST_PAUSE = 5.0
"""Seconds between two beats, at most."""
RECENT = 12
"""Beats of which the longest round trip is shown."""
CONNECT_SECONDS = 30.0
STATUS_FILE = "hosts.json"
LOST, LEFT_JOB = "lost", "left"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Host:
    """A host of the job."""

    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        """Return the name with the ranks, e.g. ``node7 (ranks 8-15)``."""
        first, last = self.ranks[0], self.ranks[-1]
        if len(self.ranks) == 1:
            return f"{self.name} (rank {first})"
        if last - first + 1 == len(self.ranks):
            return f"{self.name} (ranks {first}-{last})"
        return f"{self.name} (ranks {', '.join(map(str, self.ranks))})"


class Silence:
    """How long a value has stood still, in seconds during which this process was awake.

    A process, or the machine under it, that was itself stopped must not take the others for lost when it goes on.
    """

    def __init__(self, pause: float) -> None:
        self.seconds = 0.0
        self._longest, self._looked = 2 * pause, time.monotonic()
        self._value: object = None

    def update(self, value: object) -> float:
        """Take note of the value, and return the seconds since it last changed."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, self._longest), now
        self.seconds = self.seconds + passed if value == self._value else 0.0
        self._value = value
        return self.seconds


class Heartbeat:
    """Beats for this host and watches the others while it is entered; a lost host ends the process.

    Args:
        hosts: of the job; the first one has rank 0.
        rank: this rank; the first one of each host beats, and speaks.
        address: host and port of rank 0's store.
        seconds: of silence after which a host is lost.
        store: the store itself, on rank 0.
        status: where rank 0 writes who was heard from when.
        resume: command that goes on from the last checkpoint.
        on_lost: told of what this rank ends for, just before.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        rank: int,
        address: tuple[str, int],
        seconds: float,
        *,
        store: dist.TCPStore | None = None,
        status: Path | None = None,
        resume: str = "dualtok train RUN.yaml --resume",
        on_lost: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._hosts, self._address, self._seconds = list(hosts), address, seconds
        self._own = next(index for index, host in enumerate(hosts) if rank in host.ranks)
        self._speaks = rank == hosts[self._own].ranks[0]
        self._server, self._status, self._resume, self._on_lost = store, status, resume, on_lost
        self._pause = min(LONGEST_PAUSE, seconds / BEATS)
        self._over = threading.Event()
        self._heard = 0
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Heartbeat:
        """Begin to beat and to watch.

        Raises:
            ConfigError: rank 0's store cannot be reached.
        """
        if self._server is not None:
            self._start(self._judge)
            return self
        try:
            store = self._connect(CONNECT_SECONDS)
        except (OSError, RuntimeError) as error:
            host, port = self._address
            raise ConfigError(
                f"{self._hosts[self._own].name} cannot reach {host}:{port}, where {self._hosts[0]} listens for the "
                "heartbeats of all hosts; let hosts reach each other on all ports, or set monitor.heartbeat_seconds: 0"
            ) from error
        self._start(self._beat, store)
        self._start(self._watch)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stop; a host that ends without an error says so, and the others do not wait for its beats any more."""
        self._over.set()
        if error is None:
            for thread in self._threads:
                thread.join(self._pause)

    def _start(self, task: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=task, args=arguments, name="dualtok-heartbeat", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _connect(self, seconds: float) -> dist.TCPStore:
        return connect_store(lambda: self._address, timedelta(seconds=seconds))

    def _beat(self, store: dist.TCPStore | None) -> None:
        """Write this host's counter and read the verdict. A dead network makes this thread hang, hence ``_watch``."""
        round_trips: deque[float] = deque([0.0], maxlen=RECENT)
        over = False
        while not over:
            over = self._over.is_set()
            try:
                store = store or self._connect(self._pause)
                started = time.monotonic()
                if self._speaks:
                    store.set(_key(self._own), LEFT_JOB if over else f"{self._heard} {max(round_trips):.6f}")
                verdict = store.get(LOST).decode()
                round_trips.append(time.monotonic() - started)
                self._heard += 1
            except (OSError, RuntimeError):  # the connection broke; if that is all, the next one works
                store, verdict = None, ""
            if verdict and not over:
                lost = {int(index): silence for index, silence in json.loads(verdict).items()}
                self._end(*(self._describe(index, silence, lost) for index, silence in lost.items()))
            self._over.wait(0 if over else self._pause)

    def _watch(self) -> None:
        """End this host's ranks when rank 0's store has not answered for too long."""
        pause = self._pause / 2
        silence = Silence(pause)
        while not self._over.wait(pause):
            if silence.update(self._heard) > self._seconds:
                first, own = self._hosts[0], self._hosts[self._own]
                self._end(
                    f"host {first}, which the others meet at, has not been heard from for {silence.seconds:.0f} s: it "
                    f"is down, or this host, {own}, is cut off. The ranks of this host end here; if {first.name} is "
                    f"alive, it says how the others go on. When the network is fixed: {self._resume}"
                )

    def _judge(self) -> None:
        """On rank 0: watch the counters of the other hosts."""
        store = self._server
        assert store is not None
        others = range(1, len(self._hosts))
        silences = {index: Silence(self._pause) for index in others}
        warned: set[int] = set()
        while not self._over.wait(self._pause):
            values = [value.decode() for value in store.multi_get([_key(index) for index in others])]
            for index, value in zip(others, values, strict=True):
                silences[index].update(value)
                if value == LEFT_JOB:
                    silences[index].seconds = 0.0
            lost = {index: silence.seconds for index, silence in silences.items() if silence.seconds > self._seconds}
            if lost:
                store.set(LOST, json.dumps(lost))
                messages = [self._describe(index, silence, lost) for index, silence in lost.items()]
                for message in messages:
                    print_to_stderr(f"dualtok: error: {message}")
                self._on_lost("; ".join(messages))
                time.sleep(2 * self._pause)  # the other ranks must read it before the store goes
                os._exit(LOST_HOST)
            late = {index for index, silence in silences.items() if silence.seconds > self._seconds / 2}
            for index in sorted(late - warned):
                print_to_stderr(
                    f"dualtok: host {self._hosts[index]} was last heard from {silences[index].seconds:.0f} s ago; at "
                    f"{self._seconds:.0f} s it counts as lost"
                )
            warned = late
            self._write_status(silences, values)

    def _write_status(self, silences: dict[int, Silence], values: list[str]) -> None:
        """Write who was heard from when, and how long each host's last beat took: for people, and for other tools."""
        if self._status is None:
            return
        rows = [
            {
                "host": self._hosts[0].name,
                "ranks": self._hosts[0].ranks,
                "silent_seconds": 0.0,
                "round_trip_seconds": 0.0,
            }
        ]
        for (index, silence), value in zip(silences.items(), values, strict=True):
            host, numbers = self._hosts[index], value.split()
            rows.append(
                {
                    "host": host.name,
                    "ranks": host.ranks,
                    "silent_seconds": round(silence.seconds, 3),
                    "round_trip_seconds": float(numbers[1]) if len(numbers) == 2 else 0.0,
                }
            )
        with suppress(OSError):  # a full disk is told of by what needs the disk
            write_text(self._status, json.dumps({"time": time.time(), "hosts": rows}, indent=1) + "\n")

    def _describe(self, index: int, silence: float, lost: Collection[int]) -> str:
        remaining = ", ".join(host.name for other, host in enumerate(self._hosts) if other not in lost)
        return (
            f"host {self._hosts[index]} has not been heard from for {silence:.0f} s: it is down, cut off, or its ranks "
            "have ended (see its own log). The job ends. To go on from the last checkpoint without it, start the "
            f"launcher on the remaining hosts, {remaining}: {self._resume} (`dualtok launch` does so by "
            "itself with launch.min_nodes, torchrun with --nnodes MIN:MAX, --max-restarts and --auto-resume)"
        )

    def _end(self, *messages: str) -> NoReturn:
        """End this rank, at once: the main thread is in a collective that never ends."""
        if self._speaks:
            for message in messages:
                print_to_stderr(f"dualtok: error: {message}")
        self._on_lost("; ".join(messages))
        if not self._speaks:
            time.sleep(2 * self._pause)  # the launcher may kill the rank that speaks as soon as another one ends
        os._exit(LOST_HOST)


def watch_hosts(
    ranks: Ranks, seconds: float, *, status: Path | None = None, on_lost: Callable[[str], None] = lambda _: None
) -> Heartbeat | None:
    """Return what watches the hosts of the job; None on one host and for 0 seconds.

    Args:
        ranks: of the whole job.
        seconds: of silence after which a host is lost.
        status: file that rank 0 keeps up to date.
        on_lost: told of what this rank ends for, just before.
    """
    if ranks.world_size == 1 or not seconds:
        return None
    hosts = group_by_host(ranks.gather_objects(_this_host()))
    if len(hosts) == 1:
        return None
    address = os.environ["MASTER_ADDR"]
    store = open_store(address, len(hosts)) if ranks.is_first else None
    port = ranks.from_first(store.port if store is not None else 0)
    return Heartbeat(
        hosts,
        ranks.rank,
        (address, port),
        seconds,
        store=store,
        status=status,
        resume=resume_command(sys.argv[1:]),
        on_lost=on_lost,
    )


def open_store(address: str, hosts: int) -> dist.TCPStore:
    """Return rank 0's store for so many hosts, on a free port of its own."""
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
    for name in (LOST, *map(_key, range(hosts))):
        store.set(name, "")
    return store


def group_by_host(names: Sequence[tuple[str, str]]) -> list[Host]:
    """Return the hosts of ranks that gave (name, identity), in the order of their first ranks."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, name in enumerate(names):
        ranks.setdefault(name, []).append(rank)
    return [Host(name, tuple(own)) for (name, _), own in ranks.items()]


def resume_command(arguments: Sequence[str]) -> str:
    """Return the command line that goes on from the last checkpoint of the one that is running."""
    own = [argument for argument in arguments if not argument.startswith(("--local_rank", "--local-rank"))]
    if not {"--resume", "--auto-resume"} & set(own):
        own.append("--resume")
    return " ".join(["dualtok", *own])


def _this_host() -> tuple[str, str]:
    """Return this host's name and, since clones of a machine may share a name, the identity of its kernel's start."""
    return os.uname().nodename, BOOT_ID.read_text() if BOOT_ID.is_file() else ""


def _key(index: int) -> str:
    return f"host/{index}"
