"""The recipes that need no scheduler, each as it is: two hosts with a rank each must train what one process trains."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from dualtok.config.launch import LaunchConfig
from dualtok.launch.job import Job
from dualtok.launch.kubernetes import mpi_job
from tests.cluster.processes import rank_processes
from tests.cluster.sshd import HOSTS, ssh_daemon
from tests.e2e.test_launchers import run_file
from tests.support import ROOT, dualtok, environment, free_port, history, succeed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow
DEADLINE = 800
"""Seconds after which a job counts as hanging; it takes 20 on an idle machine."""
SETTINGS = {"steps": 60, "evaluate_every": 60, "checkpoint_every": 10}


def needs(*programs: str) -> pytest.MarkDecorator:
    absent = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


@pytest.fixture(scope="module")
def undisturbed(small_corpus: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = run_file(small_corpus, tmp_path_factory.mktemp("plain") / "plain.yaml", train=dict(SETTINGS))
    succeed(dualtok("train", run, timeout=DEADLINE))
    return [row["loss"] for row in history(run)]


@pytest.fixture(scope="module")
def ssh_options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ssh_daemon(tmp_path_factory.mktemp("sshd")) as options:
        yield options


@pytest.fixture
def run(small_corpus: dict[str, Any], tmp_path: Path) -> Path:
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    return run_file(small_corpus, tmp_path / "run.yaml", train=dict(SETTINGS))


def start(recipe: str, run: Path, **variables: str) -> subprocess.Popen[str]:
    """Start a recipe in the run's folder for two hosts with one rank each."""
    port = str(free_port())
    settings = {
        "NODES": "2",
        "GPUS": "1",
        "PORT": port,
        "MASTER": HOSTS[0],
        "HOSTFILE": str(run.parent / "hosts"),
        "INTERFACE": "lo",
        "LOGS": str(run.parent / "logs"),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [ROOT / "launch" / recipe, "train", run, "--auto-resume"],
        env=environment(**{**settings, **variables}),
        cwd=run.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def stop(process: subprocess.Popen[str]) -> None:
    """End a recipe that still runs by the signal that it hands on to its ranks."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


def finish(*processes: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for recipes and return what they printed."""
    try:
        outputs = [process.communicate(timeout=DEADLINE)[0] for process in processes]
    finally:
        for process in processes:
            stop(process)
    assert [process.returncode for process in processes] == [status] * len(processes), "\n".join(outputs)
    return "\n".join(outputs)


def wait_for_steps(run: Path, count: int, starter: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not (run.with_suffix("") / "metrics.jsonl").exists() or len(history(run)) < count:
        if starter.poll() is not None or time.monotonic() > deadline:
            stop(starter)
            pytest.fail(f"no step {count}: {starter.communicate()[0]}")
        time.sleep(0.2)


def expect(run: Path, losses: list[float], logs: str, count: int = 2) -> None:
    assert [row["loss"] for row in history(run)] == pytest.approx(losses, rel=1e-5)
    texts = [path.read_text() for path in sorted((run.parent / "logs").rglob("*")) if re.search(logs, str(path))]
    assert len(texts) == count, f"one log per rank: {list((run.parent / 'logs').rglob('*'))}"
    assert sum("60 steps done" in text for text in texts) == 1


def test_torchrun_on_every_host(run: Path, undisturbed: list[float]) -> None:
    """A rank is killed on one of two hosts: both start their ranks again and go on from the checkpoint."""
    job = {"JOB": "one", "RESTARTS": "1"}
    hosts = [
        start("torchrun_nodes.sh", run, LOGS=str(run.parent / "logs" / name), PORT="29671", **job)
        for name in ("a", "b")
    ]
    wait_for_steps(run, 15, hosts[0])
    rank_processes(run)[-1].kill()
    finish(*hosts)
    expect(run, undisturbed, r"/attempt_\d/0/stdout\.log$", count=3)  # two starts where the rank was killed


def test_deepspeed_without_ssh(run: Path, undisturbed: list[float]) -> None:
    port = "29672"
    hosts = [start("deepspeed_no_ssh.sh", run, NODE_RANK=str(rank), PORT=port) for rank in range(2)]
    finish(*hosts)
    expect(run, undisturbed, r"_rank\d\.log$")


@needs("pdsh", "ssh", "sshd")
def test_deepspeed_over_pdsh(run: Path, undisturbed: list[float], ssh_options: str) -> None:
    finish(start("deepspeed_pdsh.sh", run, SSH_OPTIONS=ssh_options, HF_HOME=str(run.parent / "a cache")))
    expect(run, undisturbed, r"_rank\d\.log$")
    carried = (run.parent / "logs" / "deepspeed_env").read_text()
    assert f"HF_HOME={run.parent}/a cache\n" in carried
    assert "GLOO_SOCKET_IFNAME=lo\n" in carried


@needs("ssh", "sshd")
def test_deepspeed_over_ssh(run: Path, undisturbed: list[float], ssh_options: str) -> None:
    """A rank is killed: the launcher of the other host is stopped too, and both are started again."""
    starter = start("deepspeed_ssh.sh", run, SSH_OPTIONS=ssh_options, RESTARTS="1")
    wait_for_steps(run, 15, starter)
    rank_processes(run)[-1].kill()
    shown = finish(starter)
    assert "launch: restart 1 of 1" in shown
    expect(run, undisturbed, r"_rank\d\.log$", count=4)  # two starts on either host
    assert not list((run.parent / "logs").glob("*.pid"))


@needs("ssh", "sshd")
@pytest.mark.parametrize("recipe", ["deepspeed_ssh.sh", "deepspeed_pdsh.sh"])
def test_a_host_that_cannot_be_reached_is_named_at_once(run: Path, ssh_options: str, recipe: str) -> None:
    (run.parent / "hosts").write_text(f"{HOSTS[0]} slots=1\n127.0.0.3 slots=1\n")
    began = time.monotonic()
    shown = finish(start(recipe, run, SSH_OPTIONS=ssh_options), status=2)
    assert "launch: error: 127.0.0.3 cannot be reached by ssh" in shown
    assert time.monotonic() - began < 30
    shown = finish(start(recipe, run, HOSTFILE="absent"), status=2)
    assert re.search(r"launch: error: HOSTFILE=\S*absent: no such file", shown)


@needs("mpirun")
def test_mpirun_ends_with_a_checkpoint_when_asked_and_goes_on(run: Path, undisturbed: list[float]) -> None:
    variables = {"HOSTFILE": "", "NODES": "1", "GPUS": "2"}
    starter = start("mpirun.sh", run, **variables)
    wait_for_steps(run, 15, starter)
    starter.send_signal(signal.SIGTERM)
    shown = finish(starter, status=75)
    assert re.search(r"asked to end after step \d+ of 60; its checkpoint", shown)
    shutil.rmtree(run.parent / "logs")
    finish(start("mpirun.sh", run, **variables))
    expect(run, undisturbed, r"/rank\.\d/stdout$")


@needs("mpirun")
def test_an_evicted_launcher_pod_of_an_mpi_job_leaves_a_checkpoint(run: Path, undisturbed: list[float]) -> None:
    """The manifest's own command in the variables of its container, for one host: what needs no cluster of it."""
    carried = {name: os.environ[name] for name in ("TORCH_EXTENSIONS_DIR",) if name in os.environ}
    settings = LaunchConfig(interface="lo", environment={**carried, "PYTHONPATH": str(ROOT)})
    job = Job(
        1,
        2,
        settings,
        arguments=("train", str(run), "--auto-resume"),
        python=sys.executable,
        logs=str(run.parent / "logs"),
    )
    [pod] = mpi_job(job)["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in pod["env"]}
    launcher = subprocess.Popen(
        pod["command"],
        env=environment(**variables, OMPI_MCA_rmaps_base_oversubscribe="1"),
        cwd=run.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    wait_for_steps(run, 15, launcher)
    launcher.terminate()
    shown = finish(launcher, status=75)
    asked = re.search(r"asked to end after step (\d+) of 60; its checkpoint", shown)
    assert asked, shown
    assert (run.with_suffix("") / "checkpoints" / "latest").read_text() == f"step-{int(asked[1]):08d}"
    assert [row["loss"] for row in history(run)] == pytest.approx(undisturbed[: int(asked[1])], rel=1e-5)


@needs("mpirun")
def test_mpirun_names_an_interface_that_is_not_there(run: Path) -> None:
    shown = finish(start("mpirun.sh", run, HOSTFILE="", NODES="1", GPUS="2", INTERFACE="lo0"), status=2)
    assert "has no interface 'lo0' (did you mean 'lo'?)" in shown
    assert "lo" in psutil.net_if_addrs()
