"""The recipes for Slurm on a real Slurm: a rank killed, a job preempted, its time up, a node lost, MPI through srun."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.cluster.processes import rank_processes
from tests.cluster.slurm import Slurm, missing
from tests.e2e.test_launchers import run_file
from tests.support import ROOT, dualtok, environment, history, succeed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
DEADLINE = 800
"""Seconds after which something counts as not happening; a start takes 15 on an idle machine."""
STEPS = 100
SETTINGS = {"steps": STEPS, "evaluate_every": STEPS, "checkpoint_every": 20, "data_workers": 1, "schedule": "constant"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def undisturbed(small_corpus: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of the same run, started by torchrun, that nobody disturbs."""
    run = run_file(small_corpus, tmp_path_factory.mktemp("plain") / "plain.yaml", train=dict(SETTINGS))
    succeed(dualtok("train", run, ranks=2, timeout=DEADLINE))
    return [row["loss"] for row in history(run)]


def submit(cluster: Slurm, recipe: str, run: Path, *options: str, partition: str = "low", **variables: str) -> str:
    """Submit a recipe as it is for two nodes with one rank each."""
    return cluster.submit(
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gres=gpu:1",
        f"--partition={partition}",
        *options,
        str(ROOT / "launch" / recipe),
        "train",
        str(run),
        "--auto-resume",
        folder=run.parent,
        **environment(LOGS=str(run.parent / "logs"), PYTHONPATH=str(ROOT), **variables),
    )


def wait(cluster: Slurm, what: str, happened: Callable[[], bool], run: Path, seconds: float = DEADLINE) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            texts = [f"== {path}\n{path.read_text()}" for path in sorted(run.parent.rglob("*.log"))]
            texts += [f"== {path}\n{path.read_text()}" for path in sorted(run.parent.glob("*.out"))]
            texts += [cluster("squeue"), cluster.logs()[-4000:]]
            pytest.fail("\n".join([f"{what}: not within {seconds} s", *texts]))
        time.sleep(0.3)


def steps(run: Path) -> int:
    return len(history(run)) if (run.with_suffix("") / "metrics.jsonl").exists() else 0


def test_a_job_outlives_a_killed_rank_and_preemption(
    cluster: Slurm, small_corpus: dict[str, Any], undisturbed: list[float], tmp_path: Path
) -> None:
    """A rank is killed; requeued, the job is preempted by another, whose ranks find each other through MPI."""
    run = run_file(small_corpus, tmp_path / "low.yaml", train=dict(SETTINGS))
    urgent = run_file(small_corpus, tmp_path / "high.yaml", train={**SETTINGS, "steps": 20})
    job = submit(cluster, "slurm_ranks.sbatch", run)
    wait(cluster, "a checkpoint", lambda: steps(run) > 25, run)
    rank_processes(run)[-1].kill()
    wait(cluster, "requeued after the kill", lambda: cluster.field(job, "Restarts") == "1", run)
    before = steps(run)
    wait(cluster, "went on", lambda: cluster.field(job, "JobState") == "RUNNING" and steps(run) > before + 5, run)

    other = submit(cluster, "slurm_mpi.sbatch", urgent, partition="high")
    wait(cluster, "preempted", lambda: cluster.field(job, "Restarts") == "2", run)
    wait(cluster, "the urgent job", lambda: cluster.field(other, "JobState") == "COMPLETED", urgent)
    wait(cluster, "the job's end", lambda: cluster.field(job, "JobState") == "COMPLETED", run)

    logs = "".join(path.read_text() for path in sorted((tmp_path / "logs").glob(f"{job}-rank0.log")))
    assert len(re.findall(r"asked to end after step \d+ of 100; its checkpoint", logs)) == 1
    losses = [row["loss"] for row in history(run)]
    assert losses == pytest.approx(undisturbed, rel=1e-5)
    assert [row["loss"] for row in history(urgent)] == pytest.approx(undisturbed[:20], rel=1e-5)
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {
        f"{number}-rank{rank}.log" for number in (job, other) for rank in (0, 1)
    }


def test_the_notice_before_the_time_limit_requeues_torchrun(
    cluster: Slurm, small_corpus: dict[str, Any], undisturbed: list[float], tmp_path: Path
) -> None:
    """``dualtok launch`` writes and submits a job of two minutes. Slurm looks every 30 s whether a notice is due, here
    30 to 60 s after the start; a start that has done no step by then gets another."""
    run = run_file(small_corpus, tmp_path / "timed.yaml", train={**SETTINGS, "steps": 10**6, "evaluate_every": 10**6})
    options = [
        "launch.slurm.start=torchrun",
        "launch.slurm.gres=null",
        "launch.slurm.partition=low",
        "launch.slurm.time=00:02:00",
        "launch.stop_seconds=60",
    ]
    submitted = dualtok(
        "launch",
        run,
        *options,
        "--backend",
        "slurm",
        "--nodes",
        2,
        "--gpus",
        1,
        SLURM_CONF=cluster.environment["SLURM_CONF"],
        PYTHONPATH=str(ROOT),
    )
    found = re.search(r"Submitted batch job (\d+)", succeed(submitted))
    assert found, submitted.stdout
    job = found[1]
    log = run.with_suffix("") / "logs" / f"{job}-host0.log"

    def asked() -> re.Match[str] | None:
        return re.search(r"asked to end after step (\d+) of", log.read_text() if log.exists() else "")

    wait(cluster, "a notice", lambda: asked() is not None, run)
    stopped = int(asked()[1])  # type: ignore[index]
    wait(cluster, "requeued", lambda: int(cluster.field(job, "Restarts")) > 0, run)
    assert (run.with_suffix("") / "checkpoints" / "latest").read_text() == f"step-{stopped:08d}"
    wait(cluster, "went on", lambda: steps(run) > stopped + 5, run)
    cluster("scancel", job)
    wait(cluster, "no ranks left", lambda: not rank_processes(run), run)
    rows = history(run)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["loss"] for row in rows[:STEPS]] == pytest.approx(undisturbed[: len(rows)], rel=1e-5)


def test_slurm_itself_requeues_a_job_whose_node_is_lost(
    cluster: Slurm, small_corpus: dict[str, Any], undisturbed: list[float], tmp_path: Path
) -> None:
    run = run_file(small_corpus, tmp_path / "lost.yaml", train=dict(SETTINGS))
    job = submit(cluster, "slurm_ranks.sbatch", run, RESTARTS="0")  # the script does not queue it again
    wait(cluster, "a checkpoint", lambda: steps(run) > 25, run)
    cluster.lose("node2")
    wait(cluster, "requeued", lambda: cluster.field(job, "Restarts") == "1", run)
    cluster.bring_up("node2")
    wait(cluster, "the job's end", lambda: cluster.field(job, "JobState") == "COMPLETED", run)
    assert [row["loss"] for row in history(run)] == pytest.approx(undisturbed, rel=1e-5)


def test_a_cancelled_job_stays_cancelled(cluster: Slurm, small_corpus: dict[str, Any], tmp_path: Path) -> None:
    """The signal is the one of preemption, but the job must not queue itself again."""
    run = run_file(small_corpus, tmp_path / "cancelled.yaml", train={**SETTINGS, "steps": 10**6})
    job = submit(cluster, "slurm_ranks.sbatch", run)
    wait(cluster, "first steps", lambda: steps(run) > 2, run)
    cluster("scancel", job)
    wait(cluster, "no ranks left", lambda: not rank_processes(run), run)
    wait(cluster, "cancelled", lambda: cluster.field(job, "JobState") == "CANCELLED", run, seconds=60)
    time.sleep(5)  # as long as the script would need to queue the job again
    assert (cluster.field(job, "JobState"), cluster.field(job, "Restarts")) == ("CANCELLED", "0")


def test_a_users_error_is_not_tried_again(cluster: Slurm, tmp_path: Path) -> None:
    job = submit(cluster, "slurm_ranks.sbatch", tmp_path / "absent.yaml")
    wait(cluster, "failed", lambda: cluster.field(job, "JobState") == "FAILED", tmp_path / "absent.yaml")
    assert (cluster.field(job, "ExitCode"), cluster.field(job, "Restarts")) == ("2:0", "0")
    assert "no such file" in (tmp_path / "logs" / f"{job}-rank0.log").read_text()
