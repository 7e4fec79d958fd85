"""The demo: its settings hold to the method's rules, and in miniature it goes the whole way and can be repeated."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from dualtok.commands import demo
from dualtok.commands.demo import demo_steps, run_demo, write_runs
from dualtok.commands.run import start
from dualtok.config.data import SPLITS
from dualtok.config.load import parse_run
from dualtok.config.run import flat
from dualtok.data.folder import DataFolder
from dualtok.errors import ConfigError
from tests.support import ROOT, command

if TYPE_CHECKING:
    from pathlib import Path


def test_the_reference_is_at_most_a_quarter_of_the_training_data(tmp_path: Path) -> None:
    """Mission: a reference as large as the training split would make the dual model's task trivial."""
    data = parse_run(write_runs(tmp_path)["run"], source="run").data
    assert data.shares["reference"] <= data.shares["train"] / 4


def test_plain_and_dual_differ_in_nothing_but_the_objective(tmp_path: Path) -> None:
    steps = {step.name: step for step in demo_steps(tmp_path, write_runs(tmp_path))}
    plain, dual = (flat(steps[name].run.as_dict()) for name in ("plain", "dual"))
    assert {key for key in plain | dual if plain.get(key) != dual.get(key)} == {"objective", "output_dir"}
    assert steps["plain"].run.data == steps["reference"].run.data == steps["attack_reference"].run.data
    assert dual["train.deepspeed"] == str(tmp_path / "zero3.json")
    assert dual["model.path"] == str(tmp_path / "models" / "base") == str(steps["base-export"].product)


def test_the_attackers_reference_is_trained_by_the_recipe_of_the_audited_models(tmp_path: Path) -> None:
    steps = {step.name: step for step in demo_steps(tmp_path, write_runs(tmp_path))}
    recipes = [steps[name].run.train for name in ("attack_reference", "dual", "reference")]
    assert replace(recipes[0], split="train") == recipes[1]
    assert recipes[2].epochs == 6


def test_one_process_needs_no_launcher(tmp_path: Path) -> None:
    steps = demo_steps(tmp_path, write_runs(tmp_path, processes=1))
    assert {step.run.workflow.launcher for step in steps} == {"none"}
    with pytest.raises(ConfigError, match="a demo with other settings ran"):
        write_runs(tmp_path, processes=2)


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shrink the demo's models and steps, and fork its ranks, which start in less time so; nothing else."""
    settings = yaml.safe_load(demo.SETTINGS.read_text(encoding="utf-8"))
    for name, run in settings["runs"].items():
        run["train"] = {
            **run["train"],
            "epochs": None,
            "steps": 4,
            "batch_size": 8,
            "warmup_steps": 1,
            "evaluate_every": 2,
            "evaluation_blocks": 32,
        }
        run["workflow"]["reference"] = {"steps": 5}
        if name == "base":
            run["model"]["config"].update(hidden_size=48, intermediate_size=64, num_hidden_layers=1)
        run["data"] = {**run["data"], "max_documents": 500}
        run["data"]["shares"] = {name: share * 2 for name, share in run["data"]["shares"].items()}
        if "wikipedia" in run["data"]["dir"]:
            run["data"]["shares"] = {"train": 0.7, "reference": 0.2, "validation": 0.1}
    small = tmp_path / "demo.yaml"
    small.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    monkeypatch.setattr(demo, "SETTINGS", small)
    monkeypatch.setattr(start, "torchrun", lambda _, ranks, module, arguments: command(module, *arguments, ranks=ranks))
    monkeypatch.setattr(start, "python", lambda arguments: command("dualtok", *arguments))
    monkeypatch.chdir(ROOT)


@pytest.mark.slow
@pytest.mark.usefixtures("miniature")
def test_the_whole_way_in_miniature(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs"
    report = run_demo(folder, processes=2)
    lines = capfd.readouterr().out.rstrip().splitlines()
    assert lines[-1] == f"report: {report}"
    table = "\n".join(lines[-40:])
    for row in ("base", "reference alone", "plain, last", "dual, best", "dual, last"):
        assert row in table
    page = report.read_text(encoding="utf-8")
    assert "dual, best" in page
    hashes = {split: _hashes(folder / "data" / "sotu", split) for split in SPLITS if split != "auxiliary"}
    everything: set[str] = set().union(*hashes.values())
    assert len(everything) == sum(map(len, hashes.values())), "splits overlap"

    changed = report.stat().st_mtime_ns
    checkpoints = sorted(folder.rglob("COMPLETE"))
    times = [file.stat().st_mtime_ns for file in checkpoints]
    run_demo(folder, processes=2)
    assert capfd.readouterr().out.count("done before") == 17
    assert [file.stat().st_mtime_ns for file in checkpoints] == times, "a finished stage ran again"
    assert report.stat().st_mtime_ns == changed


def _hashes(data_dir: Path, split: str) -> set[str]:
    table: Any = DataFolder(data_dir).documents(split)
    rows = table["sha256"].to_pylist()
    assert len(set(rows)) == len(rows) > 0
    return set(rows)
