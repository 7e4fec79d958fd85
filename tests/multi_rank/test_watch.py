"""Where time goes, told by runs on two ranks with naps planted in them; all in one launch."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dualtok.monitor.timing import BACKWARD, COMMUNICATION, DATA, FORWARD, OPTIMIZER, OTHER, PHASES
from tests.multi_rank.watched_runs import NAP, WALL_FILE
from tests.support import ROOT, command, environment, history, partitioned_json, tiny_llama_config, write_run

if TYPE_CHECKING:
    from pathlib import Path

LOG_EVERY = 2
READS = 2
"""Micro-batches per step, and so naps."""
PIPELINES = {"one": 1, "four": 4}
"""Micro-batches per step of the pipelines."""


class Launched:
    def __init__(self, folder: Path, corpus: dict[str, Any]) -> None:
        self.folder = folder
        zero = {"batch_size": 8, "gradient_accumulation": READS, "deepspeed": partitioned_json(folder)}
        unreachable = {"wandb": {}, "csv": True, "peak_tflops": 0.01}
        runs = [f"{self.write('plain', corpus, zero, unreachable)}=nowhere", f"{self.write('slow', corpus, zero)}=data"]
        for name, count in PIPELINES.items():
            pipeline = {
                "batch_size": 4 * count,
                "gradient_accumulation": count,
                "engine": "pipeline",
                "pipeline": {"stages": 2},
            }
            runs.append(f"{self.write(name, corpus, pipeline)}=passes")
        (folder / "one").mkdir()
        (folder / "one" / "events").write_text("a file where the folder should be")
        wandb = {
            "MODE": "online",
            "BASE_URL": "http://127.0.0.1:9",
            "API_KEY": 40 * "0",
            "SILENT": "true",
            "ERROR_REPORTING": "false",
            "INIT_TIMEOUT": "5",
        }
        job = command("tests.multi_rank.watched_runs", *runs, ranks=2)
        variables = environment(LOCAL_SIZE="2", **{f"WANDB_{name}": value for name, value in wandb.items()})
        self.finished = subprocess.run(
            job, env=variables, capture_output=True, text=True, timeout=600, cwd=ROOT, check=False
        )
        assert self.finished.returncode == 0, self.finished.stderr

    def write(self, name: str, corpus: dict[str, Any], train: dict[str, Any], monitor: Any = None) -> Path:
        return write_run(
            self.folder / f"{name}.yaml",
            corpus,
            objective="causal_lm",
            model={"config": tiny_llama_config(tie_word_embeddings=False)},
            train={"learning_rate": 1e-3, "steps": 2 * LOG_EVERY, "precision": "fp32", "evaluation_blocks": 8, **train},
            monitor={"log_every": LOG_EVERY, **(monitor or {})},
        )

    def ranks(self, name: str) -> list[dict[str, Any]]:
        """Return every rank's figures of the second half of a run, which starts up nothing."""
        entry = history(self.folder / name, "ranks.jsonl")[-1]
        assert (entry["step"], entry["steps"]) == (2 * LOG_EVERY, LOG_EVERY)
        return entry["ranks"]

    def events(self, name: str) -> dict[str, float]:
        """Return the last value of each scalar."""
        events = EventAccumulator(str(self.folder / name / "events"))
        events.Reload()
        return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def launched(small_corpus: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return Launched(tmp_path_factory.mktemp("watch"), small_corpus)


@pytest.mark.slow
def test_phases_make_up_the_step(launched: Launched) -> None:
    for name in ("plain", "slow", *PIPELINES):
        seconds = json.loads((launched.folder / name / WALL_FILE).read_text())[-LOG_EVERY:]
        rows = launched.ranks(name)
        assert rows[0]["wall"] == pytest.approx(sum(seconds) / LOG_EVERY, rel=0.02, abs=0.05), name
        for row in rows:
            assert sum(row[phase] for phase in PHASES) == pytest.approx(row["wall"], abs=1e-4)
            assert row[OTHER] < 0.5 * row["wall"], "most of a step has a name"
            assert all(row[phase] > 0 for phase in (DATA, FORWARD, BACKWARD, COMMUNICATION, OPTIMIZER)), name


@pytest.mark.slow
def test_a_slow_reader_is_seen_where_it_is_and_the_other_rank_waits(launched: Launched) -> None:
    """With the phases' sum (above) this says that a nap is in one phase alone, however busy the machine is."""
    waiting, slow = launched.ranks("slow")
    assert slow[DATA] >= READS * NAP
    assert waiting[DATA] < slow[DATA] / 2
    assert waiting[COMMUNICATION] > READS * NAP / 2
    assert max(PHASES, key=lambda phase: slow[phase]) == DATA
    assert max(PHASES, key=lambda phase: waiting[phase]) == COMMUNICATION
    values = launched.events("slow")
    assert values["time_max/data"] == pytest.approx(slow[DATA], abs=1e-5)
    assert values["time/data"] == pytest.approx((slow[DATA] + waiting[DATA]) / 2, abs=1e-5)
    assert values["ranks/slowest"] == 1
    assert values["ranks/slowest_ratio"] > 1.1


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_the_bubble_is_that_of_the_schedule(launched: Launched, name: str) -> None:
    """(P - 1) / (M + P - 1); naps are most of each pass, so that the stages are nearly equal."""
    rows, count = launched.ranks(name), PIPELINES[name]
    longest = max(row["busy"] + row["pipeline"] for row in rows)
    assert 1 - sum(row["busy"] for row in rows) / 2 / longest == pytest.approx(1 / (count + 1), abs=0.15)
    if name == "four":  # the other one's events cannot be written
        assert launched.events(name)["pipeline/bubble"] == pytest.approx(1 / (count + 1), abs=0.15)


@pytest.mark.slow
def test_monitors_that_fail_are_told_once_and_training_goes_on(launched: Launched) -> None:
    for channel in ("monitor.wandb", "monitor.tensorboard"):
        lines = [line for line in launched.finished.stderr.splitlines() if f"dualtok: {channel}: " in line]
        assert len(lines) == 1, launched.finished.stderr
    assert [row["step"] for row in history(launched.folder / "one")] == list(range(1, 2 * LOG_EVERY + 1))
    values = launched.events("plain")
    written = {file.stem for file in (launched.folder / "plain" / "csv").iterdir()}
    assert written == {tag.replace("/", "_") for tag in values}, "CSV and TensorBoard have the same scalars"
    assert 0 < values["throughput/mfu"] < 1
