"""A host that falls silent is named by the others; one that is late, or leaves, is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import IO, TYPE_CHECKING

import pytest

from dualtok.distributed import heartbeat
from dualtok.distributed.heartbeat import LOST_HOST, Host, Silence, group_by_host, resume_command
from tests.support import ROOT, environment, python

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 3.0
MEMBER = """
import os, sys, time
from pathlib import Path
from dualtok.distributed.heartbeat import Heartbeat, Host, open_store
rank, port, seconds, status = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])
hosts = [Host("node0", (0,)), Host("node1", (1, 2)), Host("node2", (3,))]
store = open_store("127.0.0.1", len(hosts)) if rank == 0 else None
port = store.port if store else port
print(port, os.getpid(), flush=True)
sys.stdin.readline()  # all have imported what they need
with Heartbeat(hosts, rank, ("127.0.0.1", port), seconds, store=store, status=status, resume="dualtok train x"):
    sys.stdin.readline()
if rank == 0:
    sys.stdin.readline()  # the store lives as long as rank 0
"""


class Member:
    """A rank, as a process."""

    def __init__(self, rank: int, port: int, folder: Path) -> None:
        command = python("-c", MEMBER, rank, port, SECONDS, folder / "hosts.json")
        self.process = subprocess.Popen(
            command,
            text=True,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def started(self) -> int:
        assert self.process.stdout is not None
        port, self.number = map(int, self.process.stdout.readline().split())
        return port

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the rank itself, of which ``process`` is the client (:mod:`tests.warm`)."""
        os.kill(self.number, number)

    def go_on(self) -> None:
        stream: IO[str] | None = self.process.stdin
        assert stream is not None
        stream.write("\n")
        stream.flush()

    def says(self, words: str) -> None:
        """Wait until it says so on standard error."""
        assert self.process.stderr is not None
        while words not in (line := self.process.stderr.readline()):
            assert line, "it ended without saying so"

    def end(self) -> tuple[int, str]:
        self.process.wait(60)
        assert self.process.stderr is not None
        own = [line for line in self.process.stderr.read().splitlines() if line.startswith("dualtok:")]
        return self.process.returncode, "\n".join(own)


def job(folder: Path) -> list[Member]:
    first = Member(0, 0, folder)
    port = first.started()
    others = [Member(rank, port, folder) for rank in (1, 2, 3)]
    for member in others:
        assert member.started() == port
    for member in (first, *others):
        member.go_on()
    return [first, *others]


@pytest.mark.slow
def test_a_silent_host_is_named_and_ends_the_job(tmp_path: Path) -> None:
    members = job(tmp_path)
    time.sleep(SECONDS)
    rows = json.loads((tmp_path / "hosts.json").read_text())["hosts"]
    assert [(row["host"], row["ranks"]) for row in rows] == [("node0", [0]), ("node1", [1, 2]), ("node2", [3])]
    assert all(row["silent_seconds"] < SECONDS for row in rows)
    assert all(0 < row["round_trip_seconds"] < SECONDS for row in rows[1:])

    started = time.monotonic()
    for member in members[1:3]:
        member.signal(signal.SIGSTOP)  # as if the whole host hung
    first, last = members[0].end(), members[3].end()
    assert SECONDS * 0.8 < time.monotonic() - started < 20 * SECONDS
    error = "dualtok: error: host node1 (ranks 1-2) has not been heard from for 3 s"
    for status, said in (first, last):
        assert status == LOST_HOST
        assert error in said
        assert "remaining hosts, node0, node2: dualtok train x" in said
    assert "dualtok: host node1 (ranks 1-2) was last heard from 2 s ago; at 3 s it counts as lost" in first[1]

    for member in members[1:3]:
        member.signal(signal.SIGCONT)
    status, said = members[1].end()
    assert status == LOST_HOST
    assert "host node0 (rank 0), which the others meet at, has not been heard from for 3 s" in said
    assert "this host, node1 (ranks 1-2), is cut off" in said
    assert members[2].end() == (LOST_HOST, ""), "one rank of a host speaks for it"


@pytest.mark.slow
def test_a_lost_host_ends_the_job_even_if_nobody_reads_of_it(tmp_path: Path) -> None:
    """A host that is cut off from the launcher has lost whoever read its ranks' messages, too."""
    members = job(tmp_path)
    for member in (members[0], members[3]):
        assert member.process.stderr is not None
        member.process.stderr.close()
    for member in members[1:3]:
        member.signal(signal.SIGSTOP)
    assert [members[place].process.wait(60) for place in (0, 3)] == [LOST_HOST, LOST_HOST]
    for member in members[1:3]:
        member.process.kill()
        member.process.wait()


@pytest.mark.slow
def test_a_late_host_and_one_that_leaves_are_not_lost(tmp_path: Path) -> None:
    members = job(tmp_path)
    members[3].go_on()
    for member in members[1:3]:
        member.signal(signal.SIGSTOP)
    members[0].says("dualtok: host node1 (ranks 1-2) was last heard from")  # at two thirds of what counts as lost
    for member in members[1:3]:
        member.signal(signal.SIGCONT)
    assert members[3].end() == (0, "")
    time.sleep(1.5 * SECONDS)
    for member in members:
        if member is not members[3]:
            assert member.process.poll() is None
            member.go_on()
    assert [member.end() for member in members[1:3]] == [(0, ""), (0, "")]
    members[0].go_on()
    status, said = members[0].end()
    assert (status, said) == (0, ""), "it was told once, and no host was lost"


def test_a_process_that_was_stopped_itself_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    silence = Silence(pause=1.0)
    seen = []
    for step, value in ((1.0, "1"), (1.0, "1"), (1.0, "1"), (500.0, "1"), (1.0, "2")):
        now += step
        seen.append(silence.update(value))
    assert seen == [0.0, 1.0, 2.0, 4.0, 0.0]


def test_hosts_of_one_name_are_told_apart() -> None:
    hosts = group_by_host([("a", "1"), ("b", "1"), ("a", "1"), ("b", "2")])
    assert hosts == [Host("a", (0, 2)), Host("b", (1,)), Host("b", (3,))]
    assert [str(host) for host in hosts] == ["a (ranks 0, 2)", "b (rank 1)", "b (rank 3)"]
    assert str(Host("c", (4, 5, 6))) == "c (ranks 4-6)"


def test_the_command_that_goes_on() -> None:
    assert resume_command(["--local_rank=0", "train", "run.yaml"]) == "dualtok train run.yaml --resume"
    assert resume_command(["train", "run.yaml", "--auto-resume"]) == "dualtok train run.yaml --auto-resume"
