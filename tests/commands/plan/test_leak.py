"""What ``dualtok plan`` and ``dualtok train`` say of leakage, and of runs that the map says nothing about."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dualtok.cli import app
from dualtok.commands.plan.inputs import material_of
from dualtok.commands.plan.leak import expected_of, warning_of
from dualtok.config.load import load_run
from dualtok.plan.leak import expect, load_map
from tests.support import dualtok, error_line, succeed, tiny_llama_config, write_run

TRAIN = {"learning_rate": 1e-3, "epochs": 3, "batch_size": 8}


@pytest.fixture
def unprepared(tmp_path: Path) -> Path:
    section = {"dir": str(tmp_path / "not-prepared"), "source": "x.jsonl", "block_length": 64, "vocab_size": 512}
    return write_run(
        tmp_path / "run.yaml", section, objective="causal_lm", model={"config": tiny_llama_config()}, train=TRAIN
    )


@pytest.fixture
def prepared(small_corpus: dict[str, Any], tmp_path: Path) -> Path:
    return write_run(
        tmp_path / "run.yaml",
        {"dir": small_corpus["dir"]},
        objective="causal_lm",
        model={"config": tiny_llama_config()},
        train=TRAIN | {"batch_size": 256},
    )


def test_documents_of_the_command_line_are_told_what_to_expect(unprepared: Path) -> None:
    arguments = ["plan", str(unprepared), "--gpus", "1", "--tokens", "64000"]
    shown = CliRunner().invoke(app, [*arguments, "--documents", "400", "--auxiliary", "100"])
    assert shown.exit_code == 0, shown.output
    words = " ".join(shown.output.split())
    assert "3 epochs over 400 documents: AUC of the strongest attack" in words
    assert "the reference alone, 100 auxiliary documents" in words
    assert "outside of what was measured (parameters" in words
    told = json.loads(CliRunner().invoke(app, [*arguments, "--documents", "400", "--json"]).stdout)["expected"]
    assert (told["documents"], told["epochs"], told["reference_gain"]) == (400, 3, None)
    assert 0.5 <= told["auc"]["low"] < told["auc"]["value"] < told["auc"]["high"] <= 1
    nothing = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["expected"]
    assert nothing is None, "nobody said how many documents there are"


def test_documents_of_prepared_data_are_counted(prepared: Path, small_corpus: dict[str, Any]) -> None:
    run = load_run(prepared)
    material = material_of(run)
    splits = json.loads((Path(small_corpus["dir"]) / "manifest.json").read_text())["splits"]
    train, *others = (splits[name]["documents"] for name in ("train", "reference", "auxiliary"))
    assert (material.documents, material.auxiliary) == (train, sum(others))
    assert train > sum(others) > max(others) > 0
    parameters = 512 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32) + 32
    told = expected_of(run, material)
    assert told == expect(load_map(), documents=train, epochs=3, auxiliary=sum(others), parameters=parameters)


def test_steps_are_counted_as_epochs(prepared: Path) -> None:
    run = load_run(prepared, ["train.epochs=null", "train.steps=6"])
    material = material_of(run)
    assert material.blocks is not None
    told = expected_of(run, material)
    assert told is not None
    assert told.epochs == pytest.approx(6 * 256 / material.blocks)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("prepared", ["--documents", "9"], "--documents: the data is prepared"),
        ("prepared", ["--auxiliary", "9"], "--auxiliary: the data is prepared"),
        ("unprepared", ["--auxiliary", "9"], "--auxiliary: has no effect without --documents"),
    ],
)
def test_counts_without_effect_are_refused(
    request: pytest.FixtureRequest, data: str, options: list[str], message: str
) -> None:
    result = dualtok("plan", request.getfixturevalue(data), *options)
    assert result.returncode == 2
    assert message in error_line(result)


def test_training_outside_of_the_map_is_warned_about_once(prepared: Path) -> None:
    said = dualtok("train", prepared, "train.epochs=0.5", ranks=2)
    succeed(said)
    [line] = [line for line in said.stderr.splitlines() if "outside of what was measured" in line]
    assert "parameters" in line
    assert "private documents" not in line, "150 documents were measured"


def test_runs_that_make_references_or_keep_an_account_of_their_own_are_not_warned_about(prepared: Path) -> None:
    assert warning_of(load_run(prepared)) is not None
    assert warning_of(load_run(prepared, ["train.split=reference"])) is None
    private = ["train.engine=opacus", "train.precision=fp32", "privacy={epsilon: 8, delta: 1.0e-5}"]
    assert warning_of(load_run(prepared, private)) is None


def test_a_run_that_was_measured_is_not_warned_about(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = load_map()
    wider = replace(measured, ranges=measured.ranges | {"parameters": (1e3, 1e6), "auxiliary": (0.1, 1)})
    monkeypatch.setattr("dualtok.commands.plan.leak.load_map", lambda: wider)
    assert warning_of(load_run(prepared)) is None
