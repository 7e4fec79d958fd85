"""Jobs that ``dualtok launch`` starts on several hosts, which are namespaces of this one: the losses of one host, and
what follows when a host goes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.cluster.netns import INTERFACE, Cluster, Host, cluster, missing
from tests.data.remote.servers import CREDENTIALS, s3_server, upload
from tests.e2e.test_users_sentence import SEED, SHARDED, TRAIN, WIDE
from tests.support import dualtok, history, partitioned_json, save_model, succeed, tiny_llama_config, write_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REASON = missing()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.skipif(REASON is not None, reason=str(REASON))]
NAMES = ("host-a", "host-b", "host-c")
CODE_OF_A_LOST_HOST = 71
PATIENCE = 10.0
"""``monitor.heartbeat_seconds`` of one of the tests; the other leaves it as it is."""
DEADLINE = 600.0
"""Seconds for what would otherwise hang; a busy machine may take minutes to start ten processes."""
NAMED_WITHIN = 60.0
"""Seconds from the cut until the survivors name the host."""
COLUMNS = ("loss", "hard_loss", "memorized_loss", "plain_loss")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster") / "hosts", NAMES) as made:
        yield made


@pytest.fixture
def hosts(started: Cluster) -> Cluster:
    """Three hosts, each of which can be reached: the test before may have cut one off."""
    started.fix()
    return started


class Job:
    """``dualtok launch`` on a host, with all that the launcher and its ranks print."""

    def __init__(self, hosts: Cluster, host: Host, run: Path, *options: str, **variables: str) -> None:
        self.log = run.parent / f"{host.name}.log"
        self.rank_logs = run.with_suffix("") / "logs"
        command = [
            sys.executable,
            "-m",
            "dualtok",
            "launch",
            str(run),
            f"launch.interface={INTERFACE}",
            "launch.restarts=1",
            *options,
        ]
        with self.log.open("w", encoding="utf-8") as stream:
            self.process = host.start(command, stream, **{**hosts.variables, **variables})

    @property
    def output(self) -> str:
        """The terminal's, then what DeepSpeed's launcher puts into files alone, one start after the other."""
        files = [self.log, *sorted(self.rank_logs.glob("*_rank*.log"))]
        return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)

    def error_lines(self) -> list[str]:
        return [line[line.index("dualtok: error:") :] for line in self.output.splitlines() if "dualtok: error:" in line]

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output[-6000:]}") from None


def wait_for(done: Callable[[], object], job: Job, seconds: float, *, ends: bool = False) -> float:
    """Return the seconds until ``done()`` holds; fail at the deadline, and when a job ends before that should not."""
    started = time.monotonic()
    while not done():
        passed = time.monotonic() - started
        assert passed < seconds, f"not within {seconds} s:\n{job.output[-6000:]}"
        assert ends or job.process.poll() is None or done(), job.output[-6000:]
        time.sleep(0.02)
    return time.monotonic() - started


def steps_done(run: Path) -> int:
    file = run.with_suffix("") / "metrics.jsonl"
    return len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0


def last_checkpoint(run: Path) -> int:
    """Return the step of the last complete checkpoint."""
    name = (run.with_suffix("") / "checkpoints" / "latest").read_text(encoding="utf-8")
    return int(name.removeprefix("step-"))


def first_step(output: str) -> int:
    """Return the first step that a training run's output tells of."""
    line = next(line for line in output.splitlines() if "train " in line and "tokens/s" in line)
    return int(line.split("/")[0].split()[-1])


def assert_alike(run: Path, expected: Path) -> None:
    """Both runs' losses are equal, step by step."""
    rows, others = history(run), history(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for name in COLUMNS:
        if others[0].get(name) is not None:
            np.testing.assert_allclose(
                [row[name] for row in rows], [row[name] for row in others], rtol=1e-5, err_msg=name
            )


def ranks_on(host: Host) -> list[str]:
    """Return the ranks of a job that run on a host, as command lines."""
    return [line for line in host.commands() if "-m dualtok " in line and "torch.distributed.run" not in line]


def test_the_users_sentence_over_two_hosts_goes_on_when_one_is_lost(
    hosts: Cluster, small_corpus: dict[str, Any], tmp_path: Path
) -> None:
    """Sharded pipeline, offloaded reference, shards on S3 and dual loss, under torchrun: first over a slow cable, then
    over none, then on the remaining host."""
    reference = save_model(tmp_path / "reference", seed=7, initializer_range=WIDE)
    config = tiny_llama_config(num_hidden_layers=4, tie_word_embeddings=False, initializer_range=WIDE)
    common = {
        "seed": SEED,
        "objective": "dual",
        "model": {"config": config},
        "reference": {"mode": "offload", "model": str(reference)},
        "monitor": {"log_every": 1, "heartbeat_seconds": PATIENCE},
    }
    train = {**TRAIN, "checkpoint_every": 2, "deepspeed": partitioned_json(tmp_path)}
    alone = write_run(tmp_path / "alone.yaml", small_corpus, train=train, **common)
    one_host = write_run(tmp_path / "one_host.yaml", small_corpus, train={**train, **SHARDED}, **common)
    succeed(dualtok("train", alone, timeout=DEADLINE))
    succeed(dualtok("train", one_host, ranks=4, timeout=DEADLINE))

    first, second = hosts.hosts[:2]
    with s3_server(hosts.gateway) as url:
        data = {
            "dir": upload(Path(small_corpus["dir"]), url, "blocks"),
            "stream": {"endpoint_url": url, "cache_dir": str(tmp_path / "cache")},
        }
        run = write_run(tmp_path / "run.yaml", data, train={**train, **SHARDED}, **common)
        # LOCAL_SIZE as a start on one host may have left it: with it DeepSpeed looks for all ranks in shared memory.
        options = [
            "--backend=torchrun",
            "--nodes=2",
            "--gpus=2",
            "launch.master=host-a",
            "launch.min_nodes=1",
            "launch.torchrun.last_call_seconds=10",
            "launch.torchrun.read_seconds=10",
            "launch.environment={LOCAL_SIZE: '4'}",
        ]
        variables = {**CREDENTIALS, "AWS_EC2_METADATA_DISABLED": "true"}
        jobs = [Job(hosts, host, run, *options, **variables) for host in (first, second)]
        wait_for(lambda: steps_done(run) >= 2, jobs[0], DEADLINE)
        second.slow_down("256kbit")
        slow = wait_for(lambda: steps_done(run) >= 5, jobs[0], DEADLINE)
        while slow < 1.5 * PATIENCE:  # until a lost host would have been named
            time.sleep(0.1)
            slow += 0.1
        during = steps_done(run)
        assert during < TRAIN["steps"] - 1, "nothing was left to be cut off from"
        assert not any(job.error_lines() for job in jobs), "a slow host was taken for a lost one"
        beats = json.loads((run.with_suffix("") / "hosts.json").read_text(encoding="utf-8"))["hosts"]
        assert [(row["host"], row["ranks"]) for row in beats] == [("host-a", [0, 1]), ("host-b", [2, 3])]
        second.cut()
        seconds = wait_for(jobs[0].error_lines, jobs[0], NAMED_WITHIN)
        print(
            f"{during - 2} steps in {slow:.0f} s over the slow cable, {beats[1]['round_trip_seconds']} s for a beat; "
            f"named after {seconds:.1f} s: {jobs[0].error_lines()[0]}"
        )
        assert "host host-b (ranks 2-3) has not been heard from for 10 s" in jobs[0].error_lines()[0]
        wait_for(jobs[1].error_lines, jobs[1], NAMED_WITHIN)
        assert "host host-a (ranks 0-1), which the others meet at, has not been heard from" in jobs[1].error_lines()[0]
        wait_for(lambda: not ranks_on(second), jobs[1], NAMED_WITHIN, ends=True)
        saved = last_checkpoint(run)
        assert jobs[0].wait(DEADLINE) == 0, jobs[0].output
    assert first_step(jobs[0].output.split("dualtok: error:")[1]) == saved + 1
    assert len(jobs[0].error_lines()) == len(jobs[1].error_lines()) == 1
    for whole in (one_host, alone):  # four ranks, and one
        assert_alike(run, whole)


@pytest.fixture(scope="module")
def zero_3(small_corpus: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Return the sections of a run, and the file of one that three ranks of one host have finished."""
    folder = tmp_path_factory.mktemp("zero_3")
    train = {
        "learning_rate": 5e-3,
        "batch_size": 12,
        "steps": 9,
        "precision": "fp32",
        "checkpoint_every": 2,
        "deepspeed": partitioned_json(folder),
    }
    sections = {
        "data": small_corpus,
        "seed": SEED,
        "model": {"config": tiny_llama_config()},
        "train": train,
        "objective": "causal_lm",
        "monitor": {"log_every": 1},
    }
    one_host = write_run(folder / "one_host.yaml", **sections)
    succeed(dualtok("train", one_host, ranks=3, timeout=DEADLINE))
    return sections, one_host


def hostfile(hosts: Cluster, *names: str) -> str:
    """Return the setting that names a file with one rank on each host."""
    path = hosts.folder / "hostfile"
    path.write_text("".join(f"{name} slots=1\n" for name in names))
    return f"launch.hostfile={path}"


def test_zero_3_over_pdsh_goes_on_without_the_lost_host(
    hosts: Cluster, zero_3: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    sections, one_host = zero_3
    run = write_run(tmp_path / "run.yaml", **sections)
    first, *_, lost = hosts.hosts
    job = Job(hosts, first, run, hostfile(hosts, *NAMES), "--backend=deepspeed", "launch.min_nodes=2")
    wait_for(lambda: steps_done(run) >= 3, job, DEADLINE)
    lost.cut()
    seconds = wait_for(lambda: "dualtok: error: host host-c (rank 2)" in job.output, job, NAMED_WITHIN)
    print(f"named after {seconds:.1f} s")
    saved = last_checkpoint(run)
    assert saved < sections["train"]["steps"]
    assert job.wait(DEADLINE) == 0, job.output
    assert re.search(r"launch: error: host-c cannot be reached.*launch: on host-a host-b\n", job.output, re.DOTALL)
    for rank in range(2):  # on both of the remaining hosts
        before, after = sorted(job.rank_logs.glob(f"*_rank{rank}.log"))
        [line] = [line for line in before.read_text().splitlines() if "dualtok: error:" in line]
        assert "host host-c (rank 2) has not been heard from for 30 s" in line
        assert f"on the remaining hosts, host-a, host-b: dualtok train {run} --auto-resume" in line
        if rank == 0:
            assert first_step(after.read_text()) == saved + 1
    wait_for(lambda: not ranks_on(lost), job, NAMED_WITHIN, ends=True)
    assert_alike(run, one_host)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="not installed: openmpi-bin")
def test_zero_3_by_mpirun_over_two_hosts(hosts: Cluster, zero_3: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Open MPI enters the other host over ssh; the ranks ask it who they are and leave it again."""
    sections, one_host = zero_3
    run = write_run(tmp_path / "run.yaml", **sections)
    first, second, _ = hosts.hosts
    job = Job(hosts, first, run, hostfile(hosts, *NAMES[:2]), "--backend=mpi")
    wait_for(lambda: ranks_on(second), job, DEADLINE)
    assert job.wait(DEADLINE) == 0, job.output
    assert len(list(job.rank_logs.rglob("rank.*/stdout"))) == 2
    assert_alike(run, one_host)
