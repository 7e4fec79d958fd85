"""Events are read back with TensorBoard's own reader."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from dualtok.monitor.events import HISTOGRAM_BINS, HPARAM_METRICS, EventWriter, fixed_bins
from dualtok.monitor.timing import PHASES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pytest


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_scalars_and_histograms_come_back(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path)
    writer.scalars({"loss/dual": 1.5, "evaluation/ref_auc": None, "loss/memorized": float("nan")}, step=3)
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


def test_the_layout_s_charts_take_in_every_scalar_that_they_name(tmp_path: Path) -> None:
    EventWriter(tmp_path).close()
    (tensor,) = read(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert [category.title for category in layout.category] == ["Learning", "Speed", "Data and ranks"]
    times = {f"time/{phase}" for phase in PHASES}
    assert all(any(re.fullmatch(tag, time) for tag in charts["seconds per step, mean over ranks"]) for time in times)
    assert not any(re.fullmatch("time/.*", f"time_max/{phase}") for phase in PHASES)


def test_settings_come_back_on_the_page_of_hparams(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path)
    writer.settings(
        {
            "seed": 3,
            "train.learning_rate": 1e-3,
            "train.betas": [0.9, 0.95],
            "selection": None,
            "objective": "dual",
            "model.activation_checkpointing": True,
        }
    )
    writer.close()
    content = read(tmp_path).SummaryMetadata
    start = metadata.parse_session_start_info_plugin_data(content("_hparams_/session_start_info").plugin_data.content)
    shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert shown == {
        "seed": 3,
        "train.learning_rate": 1e-3,
        "train.betas": "[0.9, 0.95]",
        "objective": "dual",
        "model.activation_checkpointing": True,
    }
    page = metadata.parse_experiment_plugin_data(content("_hparams_/experiment").plugin_data.content)
    assert [info.name.tag for info in page.metric_infos] == list(HPARAM_METRICS)


def test_a_writer_that_fails_is_left_out_after_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        def scalars(self, values: Mapping[str, float], step: int) -> None:
            raise OSError(28, "No space left on device")

    class Sound:
        def __init__(self) -> None:
            self.rows: list[tuple[int, dict[str, float]]] = []

        def scalars(self, values: Mapping[str, float], step: int) -> None:
            self.rows.append((step, dict(values)))

        def close(self) -> None:
            self.rows.append((-1, {}))

    (tmp_path / "events").write_text("a file where the folder should be")
    sound = Sound()
    writer = EventWriter(tmp_path / "events", others={"monitor.full": Full, "monitor.sound": lambda: sound})  # type: ignore[dict-item]
    for step in (1, 2):
        writer.scalars({"a": 1.0, "b": None}, step)
        writer.histogram("c", fixed_bins(torch.zeros(3)).numpy(), step)
    writer.settings({"seed": 0})
    writer.close()
    assert sound.rows == [(1, {"a": 1.0}), (2, {"a": 1.0}), (-1, {})]
    warnings = [record.getMessage() for record in caplog.records]
    assert [warning.split(": ")[1] for warning in warnings] == ["monitor.tensorboard", "monitor.full"]
    assert "No space left on device" in warnings[1]


def test_an_inactive_writer_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer = EventWriter(None)
    writer.scalars({"a": 1.0}, 1)
    writer.close()
    assert list(tmp_path.iterdir()) == []
