"""Ranks that wait for others say for whom, and do not wait for ever."""

from __future__ import annotations

import re
import socket
import subprocess
import time

import pytest

from tests.support import ROOT, environment, free_port, python

RANK = """
import os
import sys
import time
from datetime import timedelta
from dualtok.distributed import rendezvous
from dualtok.errors import ConfigError
rank, world_size, seconds = int(os.environ.get('RANK', sys.argv[1])), int(sys.argv[2]), float(sys.argv[3])
late = float(sys.argv[4]) if rank == 0 and sys.argv[4:] else 0.0
time.sleep(late)
rendezvous.NOTICE_SECONDS = 1.0
try:
    store = rendezvous.join_rendezvous(rank, world_size, timedelta(seconds=seconds))
except ConfigError as error:
    sys.exit(str(error))
store.set(f"own/{rank}", "x")
store.wait([f"own/{other}" for other in range(world_size)])
store.add("done", 1)
while rank == 0 and store.add("done", 0) < world_size:
    pass
"""


@pytest.fixture
def port() -> int:
    return free_port()


def start(rank: int, world_size: int, port: int, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        python("-c", RANK, rank, world_size, seconds),
        cwd=ROOT,
        text=True,
        env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)),
        stderr=subprocess.PIPE,
    )


def ends(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    outputs = [rank.communicate(timeout=90)[1] for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


@pytest.mark.slow
def test_ranks_that_come_late_are_waited_for_and_named_meanwhile(port: int) -> None:
    ranks = [start(rank, 3, port, 60) for rank in (0, 1)]
    time.sleep(5)
    found = ends([*ranks, start(2, 3, port, 60)])
    assert [status for status, _ in found] == [0, 0, 0], found
    assert re.search(r"dualtok: 1 of 3 ranks have not come within \d+ s: 2; here are those of", found[0][1])
    assert "still waiting" in found[0][1]
    assert found[1][1] == found[2][1] == ""


@pytest.mark.slow
def test_ranks_that_never_come_are_named_by_all_that_did(port: int) -> None:
    host = socket.gethostname()
    for status, error in ends([start(rank, 12, port, 6) for rank in (0, 11)]):
        assert status == 1
        assert "10 of 12 ranks have not come within 6 s: 1, 2, 3, 4, 5, 6, 7, 8 and 2 more" in error
        assert f"here are those of {host}." in error.splitlines()[-1]


@pytest.mark.slow
def test_a_rank_0_that_never_comes_is_named(port: int) -> None:
    [(status, error)] = ends([start(1, 2, port, 3)])
    assert status == 1
    assert "waited 0.05 minutes for rank 0 at 127.0.0.1: " in error


@pytest.mark.slow
def test_a_port_that_another_job_holds_is_named(port: int) -> None:
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        [(status, error)] = ends([start(0, 2, port, 3)])
    assert status == 1
    assert f"MASTER_PORT: rank 0 cannot open port {port} of 127.0.0.1" in error


def under_torchrun(seconds: float, late: float) -> subprocess.CompletedProcess[str]:
    """Start two ranks, of which rank 0 comes ``late`` seconds after its start."""
    return subprocess.run(
        python(
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "--no-python",
            *python("-c", RANK, "-1", "2", seconds, late),
        ),
        cwd=ROOT,
        text=True,
        env=environment(),
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_a_rank_under_torchrun_waits_for_a_rank_0_that_comes_late() -> None:
    done = under_torchrun(60, late=3)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_rank_0_under_torchrun_that_never_comes_is_named() -> None:
    done = under_torchrun(3, late=60)
    assert done.returncode == 1
    assert "waited 0.05 minutes for rank 0 at " in done.stderr
    assert "`dualtok doctor --hosts` looks" in done.stderr


@pytest.mark.slow
def test_a_second_process_of_a_rank_is_refused_by_the_name_of_the_first(port: int) -> None:
    host = socket.gethostname()
    (_, waiting), *twins = ends([start(rank, 3, port, 8) for rank in (0, 1, 1)])
    assert "1 of 3 ranks have not come within" in waiting
    refused = [error for _, error in twins if f"{host} (process " in error]
    assert len(refused) == 1, twins
    assert re.search(r"has come as rank 1 before this process: .* or choose another port", refused[0])


ALONE = """
import os, time
from datetime import timedelta
from dualtok.distributed import rendezvous
os.environ.update(rendezvous.complete_environment({}))
store = rendezvous.join_rendezvous(0, 1, timedelta(seconds=30))
print(os.environ["MASTER_PORT"] == str(store.port) != "0", flush=True)
time.sleep(1)
"""


@pytest.mark.slow
def test_jobs_of_one_process_never_take_each_others_port() -> None:
    """Many at once on one host: none looks for a port that it has not opened yet."""
    jobs = [
        subprocess.Popen(python("-c", ALONE), cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE)
        for _ in range(8)
    ]
    assert [job.communicate(timeout=90)[0] for job in jobs] == ["True\n"] * 8
