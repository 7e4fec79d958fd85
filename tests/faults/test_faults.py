"""Single faults: a restart by torchrun, a hang, odd surroundings, a folder that cannot be written."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.harness import RANKS, train
from tests.faults.worker import FAULT, SAMPLES, Fault
from tests.support import ROOT, command, dualtok, environment, error_line, succeed, tiny_llama_config, write_run

if TYPE_CHECKING:
    from pathlib import Path


def run_file(data: dict[str, Any], path: Path, **monitor: Any) -> Path:
    return write_run(
        path,
        data,
        seed=5,
        objective="causal_lm",
        model={"config": tiny_llama_config()},
        train={"learning_rate": 5e-3, "batch_size": 8, "steps": 6, "precision": "fp32", "checkpoint_every": 2},
        monitor={"log_every": 1, **monitor},
    )


@pytest.mark.slow
def test_a_job_that_torchrun_restarts_goes_on_from_its_checkpoint(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    run = run_file(small_corpus, tmp_path / "run.yaml")
    fault = Fault("kill", rank=1, step=4, mark=str(tmp_path / "mark"))
    job = command("tests.faults.worker", "train", run, "--auto-resume", ranks=RANKS, options=["--max-restarts=2"])
    samples = tmp_path / "samples"
    samples.mkdir()
    variables = {FAULT: fault.as_json(), SAMPLES: str(samples), "LOCAL_SIZE": str(RANKS)}
    ended = subprocess.run(
        job, env=environment(**variables), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert (tmp_path / "mark").exists()
    assert ended.returncode == 0, ended.stderr[-3000:]
    steps = [json.loads(line)["step"] for line in (samples / "rank-1.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 5, 6], "rank 1 died before step 4, and the last checkpoint was that of step 2"


@pytest.mark.slow
def test_a_hang_ends_the_job_with_every_ranks_stack(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    run = run_file(small_corpus, tmp_path / "run.yaml", hang_seconds=12)
    ended = train(run, tmp_path / "samples", fault=Fault("hang", rank=1, step=3, mark=str(tmp_path / "mark")))
    assert ended.status != 0
    assert ended.at - float((tmp_path / "mark").read_text()) < 60
    assert "rank 1: no progress for 12 s while in step 3; its main thread is in strike" in ended.output
    stacks = [tmp_path / "run" / "stacks" / f"rank-{rank:05d}.txt" for rank in range(RANKS)]
    assert "strike" in stacks[1].read_text()
    assert "train_step" in stacks[0].read_text()
    assert "strike" not in stacks[0].read_text()


@pytest.mark.slow
def test_an_odd_clock_locale_and_temporary_folder_change_nothing(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    plain, odd = (run_file(small_corpus, tmp_path / f"{name}.yaml") for name in ("plain", "odd"))
    succeed(dualtok("train", plain))
    temporary = tmp_path / "mit Leerzeichen und ümläut"
    temporary.mkdir()
    surroundings = {
        "LC_ALL": "C",
        "LANG": "tr_TR.UTF-8",
        "TZ": "Pacific/Kiritimati",
        "TMPDIR": str(temporary),
        "SOURCE_DATE_EPOCH": "0",
    }
    succeed(dualtok("train", odd, **surroundings))
    succeed(dualtok("train", odd, "--resume", **surroundings))
    histories = [(run.with_suffix("") / "evaluations.jsonl").read_text() for run in (plain, odd)]
    assert histories[0] == histories[1]


@pytest.mark.slow
def test_an_output_folder_that_cannot_be_written_is_named(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    run = run_file(small_corpus, tmp_path / "run.yaml")
    locked = tmp_path / "locked"
    locked.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(locked)], check=True)
    try:
        line = error_line(dualtok("train", run, f"output_dir={locked}/run"))
    finally:
        subprocess.run(["umount", str(locked)], check=True)
    assert f"{locked}" in line
    assert "Read-only file system" in line
