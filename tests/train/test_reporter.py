"""What a run reports: each callback for itself, with real files and events."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dualtok.config.load import load_run
from dualtok.distributed.layout import build_layout
from dualtok.distributed.ranks import ALONE
from dualtok.monitor.timing import PhaseTimer
from dualtok.objective.loss import Dual
from dualtok.train.evaluation import Evaluation
from dualtok.train.history import StepMetrics
from dualtok.train.reporter import Callback, Reporter, open_reporter
from dualtok.train.watch import RunWatch
from tests.support import write_run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

METRICS = StepMetrics(
    step=1,
    left_out=None,
    loss=1.5,
    hard_loss=2.0,
    memorized_loss=float("nan"),
    plain_loss=1.75,
    hard_tokens=6,
    memorized_tokens=0,
    tokens=10,
    skipped_blocks=0,
    gradient_norm=0.5,
    learning_rate=1e-3,
    tokens_per_second=1234.0,
    peak_memory_gib=0.1,
)


class Watchdog:
    def __init__(self) -> None:
        self.beats: list[str] = []

    def beat(self, doing: str) -> None:
        self.beats.append(doing)


def opened(folder: Path, *, done: int = 0, watchdog: Any = None, **monitor: Any) -> tuple[Reporter, RunWatch]:
    write_run(folder / "run.yaml", {"dir": str(folder)}, output_dir=str(folder), monitor=monitor)
    run = load_run(folder / "run.yaml")
    watch = RunWatch(PhaseTimer(), build_layout(ALONE))
    reporter = open_reporter(run, folder=folder, ranks=ALONE, watch=watch, done=done, total_steps=5, watchdog=watchdog)
    return reporter, watch


def train(reporter: Reporter, watch: RunWatch, steps: Sequence[int]) -> None:
    for step in steps:
        with watch.timer.step():
            pass
        reporter.step(replace(METRICS, step=step, loss=float(step)))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_steps_are_kept_one_by_one_and_shown_every_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter, watch = opened(tmp_path, log_every=2)
    with reporter:
        train(reporter, watch, range(1, 6))
    reporter.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    tables = lines(tmp_path / "ranks.jsonl")
    assert [(table["step"], table["steps"]) for table in tables] == [(2, 2), (4, 2), (5, 1)]
    assert scalars(tmp_path, "loss/dual") == [(2, 2.0), (4, 4.0), (5, 5.0)]
    assert [step for step, _ in scalars(tmp_path, "time/step")] == [2, 4, 5]
    shown = [line for line in capsys.readouterr().err.splitlines() if "tokens/s" in line]
    assert [line.split()[2] for line in shown] == ["2/5", "4/5", "5/5"]


def test_what_a_roll_back_repeats_is_forgotten_everywhere(tmp_path: Path) -> None:
    reporter, watch = opened(tmp_path, log_every=1)
    train(reporter, watch, [1, 2, 3])
    reporter.evaluation(Evaluation(3, 2.0, 1.5, 0.6))
    reporter.rewind(1)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1]
    assert lines(tmp_path / "evaluations.jsonl") == []
    assert [line["step"] for line in lines(tmp_path / "ranks.jsonl")] == [1]
    train(reporter, watch, [2])
    reporter.close()
    assert scalars(tmp_path, "loss/dual") == [(1, 1.0), (2, 2.0)]


def test_a_resumed_run_drops_the_lines_of_steps_that_it_repeats(tmp_path: Path) -> None:
    reporter, watch = opened(tmp_path, log_every=1)
    train(reporter, watch, [1, 2, 3])
    reporter.close()
    reporter, watch = opened(tmp_path, done=2, log_every=1)
    train(reporter, watch, [3])
    reporter.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_an_evaluation_is_written_drawn_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter, _ = opened(tmp_path)
    reporter.evaluation(Evaluation(4, 2.0, 1.5, 0.625))
    reporter.note("step 4: a note")
    said = capsys.readouterr().err
    assert "step 4: validation perplexity 7.39, member/validation gap 0.500 nats, Ref AUC 0.625" in said
    assert "step 4: a note" in said
    [line] = lines(tmp_path / "evaluations.jsonl")
    assert (line["step"], line["ref_auc"]) == (4, 0.625)
    assert scalars(tmp_path, "evaluation/ref_auc") == [(4, 0.625)]  # flushed: the run may go on for hours


def test_calibrated_losses_of_predicted_tokens_become_a_histogram(tmp_path: Path) -> None:
    reporter, _ = opened(tmp_path, histogram_every=2)
    labels = torch.tensor([[1, 2, -100]])
    window = [{"labels": labels, "reference_loss": torch.tensor([[1.0, 5.0, 0.0]])}]
    outcomes = [Dual()(torch.tensor([[2.0, 2.0, 0.0]], requires_grad=True), window[0])]
    for step in (1, 2):
        reporter.ran(step, window, outcomes)
    reporter.close()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    [histogram] = events.Histograms("calibrated/s")
    assert (histogram.step, histogram.histogram_value.num) == (2, 2)
    assert histogram.histogram_value.sum == pytest.approx(1.0 - 3.0, abs=0.13)  # bins of 1/8


def test_the_watchdog_hears_what_the_run_does(tmp_path: Path) -> None:
    watchdog = Watchdog()
    reporter, _ = opened(tmp_path, watchdog=watchdog)
    reporter.doing("in step 1")
    assert watchdog.beats == ["in step 1"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "run.yaml", {"dir": str(tmp_path)}, output_dir=str(tmp_path))
    second = replace(ALONE, rank=1)
    watch = RunWatch(PhaseTimer(), build_layout(ALONE))
    before = sorted(tmp_path.rglob("*"))
    reporter = open_reporter(
        load_run(tmp_path / "run.yaml"), folder=tmp_path, ranks=second, watch=watch, done=0, total_steps=5
    )
    train(reporter, watch, [5])
    reporter.evaluation(Evaluation(5, 2.0, 1.5, None))
    reporter.close()
    assert sorted(tmp_path.rglob("*")) == before


def test_callbacks_are_called_in_their_order() -> None:
    heard: list[str] = []

    class Named(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def note(self, text: str) -> None:
            heard.append(f"{self.name} {text}")

    with Reporter([Named("first"), Named("second")]) as reporter:
        reporter.note("hello")
        reporter.step(METRICS)  # nothing to say
    assert heard == ["first hello", "second hello"]
