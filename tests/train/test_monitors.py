"""DeepSpeed's monitors really run: CSV files are read back, W&B's and Comet's own offline files too."""

from __future__ import annotations

import csv
import json
import time
import zipfile
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.config.monitor import CometConfig, MonitorConfig, WandbConfig
from dualtok.distributed.deepspeed_config import training_config
from dualtok.distributed.ranks import join_ranks
from dualtok.errors import ConfigError
from dualtok.monitor.events import EventWriter
from dualtok.train.monitors import WANDB_RUN, require_monitors, scalar_writers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dualtok.config.train import TrainConfig

STEPS = (4, 8)


@pytest.fixture(scope="module", autouse=True)
def _job_of_one() -> None:
    join_ranks()


@contextmanager
def writer(monitor: MonitorConfig, output: Path, done: int = 0) -> Iterator[EventWriter]:
    events = EventWriter(None, others=scalar_writers(monitor, output, done))
    yield events
    events.close()


def write(monitor: MonitorConfig, output: Path, steps: tuple[int, ...] = STEPS, done: int = 0) -> None:
    with writer(monitor, output, done) as events:
        for step in steps:
            events.scalars({"loss/dual": step / 2, "time/data": 0.25, "loss/memorized": None}, step)
            events.scalars({"evaluation/ref_auc": 0.5}, step)  # at the same step, as an evaluation comes


def test_no_step_is_there_twice_after_a_roll_back(tmp_path: Path) -> None:
    """In CSV files, and for whoever reads TensorBoard's events as TensorBoard does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventWriter(tmp_path / "events", others=scalar_writers(MonitorConfig(csv=True), tmp_path, 0))
    for step in (4, 8, 12):
        events.scalars({"loss/dual": step / 2, "time/data": 0.25}, step)
    events.forget_after(4)
    for step in (8, 12, 16):
        events.scalars({"loss/dual": step / 4}, step)
    events.close()
    expected = [(4, 2.0), (8, 2.0), (12, 3.0), (16, 4.0)]
    rows = list(csv.reader((tmp_path / "csv" / "loss_dual.csv").open()))
    assert [(int(step), float(value)) for step, value in rows[1:]] == expected
    assert list(csv.reader((tmp_path / "csv" / "time_data.csv").open())) == [["step", "data"], ["4", "0.25"]]
    seen = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(event.step, event.value) for event in seen.Scalars("loss/dual")] == expected
    assert [event.step for event in seen.Scalars("time/data")] == [4]


def test_csv_has_one_header_and_each_step_once_after_a_restart(tmp_path: Path) -> None:
    monitor = MonitorConfig(csv=True)
    write(monitor, tmp_path, (4, 8, 12))
    with (tmp_path / "csv" / "loss_dual.csv").open("a") as file:
        file.write("16")  # a killed run's last row
    write(monitor, tmp_path, (12, 16), done=8)
    rows = list(csv.reader((tmp_path / "csv" / "loss_dual.csv").open()))
    assert rows == [["step", "dual"], ["4", "2.0"], ["8", "4.0"], ["12", "6.0"], ["16", "8.0"]]
    names = {file.stem for file in (tmp_path / "csv").iterdir()}
    assert names == {"loss_dual", "time_data", "evaluation_ref_auc"}, "a missing value makes no file"


def test_wandb_keeps_all_scalars_and_goes_on_with_its_run_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_RUN_ID", "WANDB_DIR", "WANDB_NAME", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monitor = MonitorConfig(wandb=WandbConfig(project="tests", group="monitors"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    write(monitor, tmp_path)
    time.sleep(1.1)  # W&B names its folder by the second
    write(monitor, tmp_path, (12,), done=8)
    run_id = (tmp_path / WANDB_RUN).read_text()
    deadline = time.monotonic() + 30
    while sorted(history := offline_history(tmp_path, run_id)) != [4, 8, 12] and time.monotonic() < deadline:
        time.sleep(0.1)  # W&B's own process writes a moment after the run has ended
    assert sorted(history) == [4, 8, 12]
    for step, row in history.items():
        assert (row["loss/dual"], row["time/data"], row["evaluation/ref_auc"]) == (step / 2, 0.25, 0.5)


def offline_history(output: Path, run_id: str) -> dict[int, dict[str, float]]:
    """Return the rows of all starts of a run by their step."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    history: dict[int, dict[str, float]] = {}
    for file in sorted((output / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")):
        store = DataStore()
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run") and record.run.project:
                assert (record.run.project, record.run.run_group) == ("tests", "monitors")
                assert (record.run.run_id, record.run.display_name) == (run_id, output.name)
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if row:
                history.setdefault(int(row["_step"]), {}).update(row)
    return history


def test_comet_keeps_all_scalars_in_its_offline_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMET_OFFLINE_DIRECTORY", raising=False)
    monkeypatch.setenv("COMET_LOGGING_CONSOLE", "ERROR")
    write(MonitorConfig(comet=CometConfig(project="tests", experiment_name="one", online=False)), tmp_path)
    (archive,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as content:
        (messages,) = [name for name in content.namelist() if name.endswith("messages.json")]
        lines = [json.loads(line) for line in content.read(messages).decode().splitlines() if line]
    metrics = [line["payload"]["metric"] for line in lines if "metric" in line.get("payload", {})]
    kept = {(metric["metricName"], metric["step"]): float(metric["metricValue"]) for metric in metrics}
    expected = {("loss/dual", step): step / 2 for step in STEPS} | {("time/data", step): 0.25 for step in STEPS}
    assert expected.items() <= kept.items()


@pytest.mark.parametrize(("package", "extra"), [("wandb", "wandb"), ("comet_ml", "comet")])
def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, package: str, extra: str) -> None:
    monkeypatch.setattr("dualtok.train.monitors.find_spec", lambda name: None if name == package else find_spec(name))
    require_monitors(MonitorConfig(csv=True))
    config: dict[str, Any] = {"wandb": {}, "comet": {}}
    with pytest.raises(ConfigError, match=rf"monitor.{extra}: {package} is not installed.*dualtok\[{extra}\]"):
        require_monitors(MonitorConfig(**config))


@pytest.mark.parametrize("section", ["wandb", "csv_monitor", "comet"])
def test_sections_of_the_deepspeed_json_are_sent_to_the_run(tmp_path: Path, section: str) -> None:
    from dualtok.config.train import TrainConfig

    def settings(enabled: bool) -> TrainConfig:
        (tmp_path / "ds.json").write_text(json.dumps({section: {"enabled": enabled}}))
        return TrainConfig(
            learning_rate=1e-3, batch_size=4, steps=1, precision="fp32", deepspeed=str(tmp_path / "ds.json")
        )

    with pytest.raises(ConfigError, match=rf"'{section}' is set.*monitor\."):
        training_config(settings(True), 1)
    training_config(settings(False), 1)
