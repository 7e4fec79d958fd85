"""`dualtok run` as users start it: each step once, taken up where it stopped, on one process or on ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from dualtok.data.sources.corpora import sotu_passages, write_jsonl
from tests.commands.run.support import settings
from tests.support import ROOT, command, dualtok, environment, error_line, history, succeed
from tests.warm import fork_of

if TYPE_CHECKING:
    from pathlib import Path


def write_file(folder: Path, **changes: Any) -> Path:
    """Write a corpus and the file of a small run."""
    write_jsonl((passage[:600] for passage in islice(sotu_passages(), 200)), folder / "corpus.jsonl")
    tree = settings(folder, **changes)
    tree["data"] |= {"lanes": 4, "vocab_size": 512}
    tree["audit"] = {"attacks": ["loss", "ref"], "bootstrap_resamples": 100, "fpr_targets": [0.1]}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


def done(folder: Path) -> dict[str, Any]:
    marks = [json.loads(file.read_text()) | {"name": file.stem} for file in (folder / "out" / "steps").glob("*.json")]
    return {mark["name"]: mark["made"] for mark in marks if mark["finished"]}


@pytest.mark.slow
def test_one_file_leads_to_a_report_and_each_step_is_done_once(tmp_path: Path) -> None:
    file = write_file(tmp_path)
    shown = succeed(dualtok("run", file)).splitlines()
    assert shown[0] == f"10 steps from {file} to {tmp_path / 'out' / 'report' / 'report.html'}"
    assert [line.split("]")[0] for line in shown if line.startswith("[")] == [f"[{n}/10" for n in range(1, 11)]
    assert any(line.startswith("[8/10] export dual") and "left" in line for line in shown)
    assert shown[-1] == f"report: {tmp_path / 'out' / 'report' / 'report.html'}"
    assert "reference alone" in "\n".join(shown[-40:])
    made = done(tmp_path)
    assert len(made) == 10

    again = succeed(dualtok("run", file))
    assert again.count(": done before") == 10
    assert done(tmp_path) == made

    cheap = succeed(dualtok("run", file, "audit.seed=3"))
    assert cheap.count(": done before") == 8
    assert "audit: audit.seed was 0, now 3: done again" in cheap
    assert {name for name, which in done(tmp_path).items() if which != made[name]} == {"audit", "report"}

    refused = error_line(dualtok("run", file, "selection.alpha=0.5", "audit.seed=3"))
    assert "'dual' (selection was null, now" in refused or "'dual' (selection.alpha was null, now 0.5" in refused
    assert "'reference' (" not in refused, "it never read that section"
    assert "--redo" in refused

    redone = succeed(dualtok("run", file, "selection.alpha=0.5", "audit.seed=3", "--redo"))
    assert redone.count(": done before") == 6
    changed = {name for name, which in done(tmp_path).items() if which != made[name]}
    assert changed == {"dual", "dual-export", "audit", "report"}
    (earlier,) = (tmp_path / "out" / "replaced").iterdir()
    assert len(history(earlier)) == 2
    assert "alpha: 0.5" in (tmp_path / "out" / "dual" / "run.yaml").read_text()


@pytest.mark.slow
def test_a_failed_step_names_its_log_and_the_run_goes_on_there(tmp_path: Path) -> None:
    file = write_file(tmp_path, reference={"model": str(tmp_path / "own")})
    error = error_line(dualtok("run", file))
    log = tmp_path / "out" / "logs" / "score.log"
    assert "step 4 of 8 (score: compute the reference's losses, once) failed: " in error
    assert str(tmp_path / "own") in error
    assert f"Its log: {log}." in error
    assert f"`dualtok run {file}` goes on at this step" in error
    assert "error" in log.read_text()
    trained = done(tmp_path)
    assert set(trained) == {"prepare", "attack_reference", "attack_reference-export"}
    (tmp_path / "own").symlink_to(tmp_path / "out" / "models" / "attack_reference")
    succeed(dualtok("run", file))
    assert {name: made for name, made in done(tmp_path).items() if name in trained} == trained


@pytest.mark.slow
def test_training_that_is_ended_saves_its_work_and_goes_on_from_there(tmp_path: Path) -> None:
    file = write_file(tmp_path, objective="causal_lm", train=settings(tmp_path)["train"] | {"steps": 400})
    with subprocess.Popen(
        command("dualtok", "run", file), env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("[4/7] train the model"):
                break
        assert any(line.strip().startswith("train causal_lm") for line in process.stdout)
        os.kill(fork_of(process.pid), signal.SIGTERM)
        process.stdout.read()
        assert process.wait(timeout=120) != 0
    before = history(tmp_path / "out" / "causal_lm")
    assert 0 < len(before) < 400
    assert "causal_lm" not in done(tmp_path)
    succeed(dualtok("run", file))
    after = history(tmp_path / "out" / "causal_lm")
    assert after[: len(before)] == before, "it began anew"
    assert [row["step"] for row in after] == list(range(1, 401))


@pytest.mark.slow
def test_ranks_of_a_launcher_learn_what_one_process_learns(tmp_path: Path) -> None:
    losses = {}
    for name, workflow in (("one", {}), ("two", {"launcher": "torchrun", "ranks": 2})):
        folder = tmp_path / name
        folder.mkdir()
        file = write_file(folder, workflow=workflow, objective="causal_lm")
        variables = {} if name == "one" else {"LOCAL_SIZE": "2"}
        succeed(dualtok("run", file, **variables))
        losses[name] = [row["loss"] for row in history(folder / "out" / "causal_lm")]
    assert losses["one"] == pytest.approx(losses["two"], rel=1e-4)
    assert "torch.distributed" not in (tmp_path / "one" / "out" / "logs" / "causal_lm.log").read_text()


@pytest.mark.slow
def test_dual_plus_is_trained_scored_and_interpolated_from_one_file(tmp_path: Path) -> None:
    shares = {"train": 0.4, "reference": 0.1, "auxiliary": 0.1, "attack_reference": 0.1, "validation": 0.15}
    data = settings(tmp_path)["data"] | {"shares": shares | {"held_out": 0.15}}
    train = settings(tmp_path)["train"] | {"batch_size": 4}
    file = write_file(tmp_path, objective="dual_plus", workflow={}, data=data, train=train)
    assert "[18/18] write the report" in succeed(dualtok("run", file))
    made = tmp_path / "out" / "models" / "dual_plus"
    trials = json.loads((made / "interpolate.json").read_text())["trials"]
    assert trials
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["reference alone", "dual_plus"]


def test_a_dry_run_prints_commands_and_writes_nothing(tmp_path: Path) -> None:
    file = write_file(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    shown = succeed(dualtok("run", file, "train.steps=3", "--dry-run")).splitlines()
    commands = [line for line in shown if not line.startswith("#")]
    assert len(commands) == 10
    assert all(line.startswith(f"dualtok {verb}") for line, verb in zip(commands, ["prepare", "train"], strict=False))
    assert all("train.steps=3" in line for line in commands if not line.startswith("dualtok export"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    import filelock

    file = write_file(tmp_path)
    (tmp_path / "out").mkdir()
    lock = tmp_path / "out" / ".run.lock"
    with filelock.FileLock(lock):
        lock.write_text("process 1 on here\n")
        assert "process 1 on here runs these steps already" in error_line(dualtok("run", file))
