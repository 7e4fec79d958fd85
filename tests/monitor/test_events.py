"""Events are read back with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dualtok.monitor.events import HISTOGRAM_BINS, EventWriter, fixed_bins

if TYPE_CHECKING:
    import pytest


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_scalars_and_histograms_come_back(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path)
    writer.scalars({"loss/dual": 1.5, "evaluation/ref_auc": None, "loss/memorised": float("nan")}, step=3)
    writer.histogram("calibrated/s", fixed_bins(torch.tensor([-1.0, -1.0, 0.5, 100.0])).numpy(), step=3)
    writer.close()
    events = read(tmp_path)
    assert events.Tags()["scalars"] == ["loss/dual"]
    (scalar,) = events.Scalars("loss/dual")
    assert (scalar.step, scalar.value) == (3, 1.5)
    (histogram,) = events.Histograms("calibrated/s")
    assert histogram.histogram_value.num == 4


def test_resuming_hides_the_steps_that_are_repeated(tmp_path: Path) -> None:
    first = EventWriter(tmp_path)
    for step in (1, 2, 3):
        first.scalars({"loss/dual": float(step)}, step)
    first.close()
    second = EventWriter(tmp_path, purge_step=3)
    second.scalars({"loss/dual": 30.0}, 3)
    second.close()
    assert [(s.step, s.value) for s in read(tmp_path).Scalars("loss/dual")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_bins_count_every_value_once_wherever_it_lies() -> None:
    values = torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 6, torch.tensor([-99.0, 99.0])])
    counts = fixed_bins(values)
    assert len(counts) == HISTOGRAM_BINS
    assert counts.sum() == len(values)
    assert counts[0] >= 1
    assert counts[-1] >= 1


def test_an_inactive_writer_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer = EventWriter(None)
    writer.scalars({"a": 1.0}, 1)
    writer.close()
    assert list(tmp_path.iterdir()) == []
