"""What a run's folder says of it while it runs, and after each way to end. The runs and their ends are real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dualtok.commands.status import RunStatus, describe, read_status
from dualtok.distributed.job_record import FOLDER, STARTED, JobRecord, read_started, write_end
from dualtok.distributed.ranks import ALONE
from dualtok.errors import ConfigError
from tests.faults.harness import train as train_on_ranks
from tests.faults.worker import FAULT, SAMPLES, Fault
from tests.support import ROOT, command, dualtok, environment, error_line, succeed, tiny_llama_config, write_run
from tests.warm import fork_of

STEPS = 8


def run_file(data: dict[str, Any], path: Path, **train: Any) -> Path:
    return write_run(
        path,
        {"dir": data["dir"]},
        objective="causal_lm",
        model={"config": tiny_llama_config()},
        train={
            "learning_rate": 5e-3,
            "batch_size": 8,
            "steps": STEPS,
            "precision": "fp32",
            "checkpoint_every": 2,
            "evaluate_every": 4,
            "evaluation_blocks": 8,
            **train,
        },
        monitor={"log_every": 1},
    )


def start(run: Path, fault: Fault, *overrides: str) -> subprocess.Popen[str]:
    """Start one rank, without a launcher, that a fault will hit."""
    variables = {FAULT: fault.as_json(), SAMPLES: str(run.parent)}
    return subprocess.Popen(
        command("tests.faults.worker", "train", run, *overrides, "--auto-resume"),
        env=environment(**variables),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def check_running(run: Path, process: int) -> None:
    """What is said of a run that hangs in step 5, and is not to be joined by a second job."""
    folder = run.with_suffix("")
    running = read_status(run)
    assert (running.state, running.step, running.total_steps) == ("running", 4, STEPS), running.reason
    assert f"process {process} on this host, of 1 rank" in running.reason
    second = error_line(dualtok("train", run, "--auto-resume"))
    assert f"output_dir {folder}: another job still trains there, rank 0 is process {process} on" in second
    assert running.seconds_per_step is not None
    assert running.seconds_since_sign is not None
    assert 0 < running.seconds_per_step < 30
    assert running.seconds_since_sign < 60
    assert running.last_evaluation["step"] == 4
    assert running.stacks == ()
    shown = describe(running)
    assert "4 of 8 (50%)" in shown
    assert " left (until " in shown
    assert f"next        tensorboard --logdir {folder}/events" in shown


@pytest.mark.slow
def test_one_run_through_all_its_ends(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    run = run_file(small_corpus, tmp_path / "run.yaml")
    folder = run.with_suffix("")

    # Of two ranks one is killed before step 4.
    ended = train_on_ranks(run, tmp_path / "samples", fault=Fault("kill", rank=1, step=4, mark=str(tmp_path / "kill")))
    assert ended.status != 0
    killed = read_status(folder)
    assert (killed.state, killed.step, killed.checkpoint) == ("killed", 3, "step-00000002"), killed.reason
    assert "rank 1 ended without a word" in killed.reason, "rank 0 only lost the connection"
    assert killed.next_command.startswith(f"torchrun --nproc-per-node 2 -m dualtok train {folder}/run.yaml --resume")

    # It hangs before step 5; until the watchdog ends it, it runs.
    hang = Fault("hang", rank=0, step=5, mark=str(tmp_path / "hang"))
    with start(run, hang, "monitor.hang_seconds=15") as process:
        deadline = time.monotonic() + 120
        while not Path(hang.mark).exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        check_running(run, fork_of(process.pid))
        process.communicate(timeout=120)
    hung = read_status(folder)
    assert (hung.state, hung.checkpoint) == ("hung", "step-00000004"), hung.reason
    assert "rank 0: no progress for 15 s while in step 5; its main thread is in strike" in hung.reason
    assert hung.stacks == (str(folder / "stacks" / "rank-00000.txt"),)
    assert "stacks      " in describe(hung)

    # Killed whole, it says nothing at all.
    with start(run, Fault("kill", rank=0, step=6, mark=str(tmp_path / "again"))) as process:
        number = fork_of(process.pid)
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    gone = read_status(folder)
    assert gone.state == "killed", gone.reason
    assert f"process {number} of 1 rank) is gone and said nothing" in gone.reason
    assert gone.stacks == (), "those of the job before"
    assert gone.next_command == f"dualtok train {folder}/run.yaml --resume"

    # A scheduler asks for the end.
    with start(run, Fault("sigterm", rank=0, step=6, mark=str(tmp_path / "notice"))) as process:
        process.communicate(timeout=120)
    preempted = read_status(folder)
    assert (preempted.state, preempted.step, preempted.checkpoint_step) == ("preempted", 6, 6), preempted.reason
    assert "asked to end after step 6 of 8" in preempted.reason

    # The command that it proposes finishes it.
    succeed(dualtok(*preempted.next_command.split()[1:]))
    finished = json.loads(succeed(dualtok("status", folder, "--json")))
    assert (finished["state"], finished["step"], finished["checkpoint"]) == ("finished", STEPS, "step-00000008")
    assert finished["next_command"] == f"dualtok export {folder} {folder}/model"
    assert finished["events"] > 0
    assert finished["last_step"]["loss"] > 0

    # A rank may write its end late.
    write_end(folder, 3, "error", "later")
    assert read_status(folder).state == "finished", "what is saved counts"


@pytest.mark.slow
def test_a_run_that_diverges_says_so(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    run = run_file(small_corpus, tmp_path / "run.yaml", learning_rate=1e30)
    error_line(dualtok("train", run))
    stopped = read_status(run)
    assert stopped.state == "stopped"
    assert "training diverged" in stopped.reason
    assert "lower train.learning_rate" in stopped.reason
    assert stopped.checkpoint is None
    assert stopped.next_command == f"dualtok train {tmp_path}/run/run.yaml", "there is nothing to resume from"


def begin(folder: Path) -> JobRecord:
    record = JobRecord(folder, ALONE)
    record.begin(total_steps=10)
    return record


def with_started(folder: Path, **changes: Any) -> RunStatus:
    """Return the status of a run whose job's record says something else."""
    begin(folder)
    started = read_started(folder)
    assert started is not None
    (folder / FOLDER / STARTED).write_text(json.dumps({**asdict(started), **changes}))
    return read_status(folder)


def test_another_process_with_the_same_number_is_another(tmp_path: Path) -> None:
    assert with_started(tmp_path).state == "running"
    assert with_started(tmp_path, process_started=1e9).state == "killed"


def test_a_job_on_another_host_is_judged_by_its_last_sign(tmp_path: Path) -> None:
    assert with_started(tmp_path, host="elsewhere").state == "running"
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "tokens": 100, "tokens_per_second": 10.0, "mfu": 0.41, "loss": 2.5}\n')
    long_ago = time.time() - 700
    os.utime(metrics, (long_ago, long_ago))
    silent = with_started(tmp_path, host="elsewhere", time=long_ago)
    assert silent.state == "silent", silent.reason
    assert "no sign for 11 min 40 s" in silent.reason
    assert "further     mfu 0.41" in describe(silent), "figures that it does not know are shown too"
    slow = '{"step": 1, "tokens": 100, "tokens_per_second": 1.0, "loss": 2.5}\n'
    metrics.write_text(slow)
    os.utime(metrics, (long_ago, long_ago))
    assert with_started(tmp_path, host="elsewhere", time=long_ago).state == "running", "a step takes 100 s"


def test_a_bug_is_told_from_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), begin(tmp_path):
        1 / 0  # noqa: B018
    crashed = read_status(tmp_path)
    assert (crashed.state, crashed.reason) == ("crashed", "rank 0: ZeroDivisionError: division by zero")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no training run .* give a run's output_dir or its YAML file"):
        read_status(tmp_path)
    (tmp_path / "run.yaml").write_text("data: {dir: x}\n")
    assert read_status(tmp_path).state == "unknown"
