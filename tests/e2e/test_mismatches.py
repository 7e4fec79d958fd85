"""A model that is not whole, or not the blocks', is refused by every verb, before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dualtok.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from tests.support import VOCABULARY, dualtok, error_line, save_model, write_run

TRAIN = {"learning_rate": 1e-3, "batch_size": 8, "steps": 1, "precision": "fp32"}
STAGES = {**TRAIN, "engine": "pipeline", "pipeline": {"stages": 2}}


@pytest.fixture(scope="module")
def models(small_corpus: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A sound model, one without a matrix, one with the tokenizer of other texts."""
    folder = tmp_path_factory.mktemp("models")
    sound = save_model(folder / "sound", seed=1)
    save_tokenizer(load_tokenizer(Path(small_corpus["dir"]) / "tokenizer"), folder / "sound-tokenizer")
    for file in (folder / "sound-tokenizer").iterdir():
        shutil.copyfile(file, sound / file.name)
    shutil.copytree(sound, folder / "incomplete")
    weights = load_file(sound / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "incomplete" / "model.safetensors", {"format": "pt"})
    save_tokenizer(train_tokenizer(["entirely other words, to be sure"] * 50, VOCABULARY), folder / "stranger")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(sound / name, folder / "stranger" / name)
    return {name: str(folder / name) for name in ("sound", "incomplete", "stranger")}


def runs(bad: str, sound: str) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Return every way of a verb to a model: arguments of the command, and sections of the run."""
    plain: dict[str, Any] = {"objective": "causal_lm"}
    dual: dict[str, Any] = {"objective": "dual"}
    interpolate = {"model": sound, "reference": sound, "surrogate_reference": sound}
    return {
        "train": (["train"], {**plain, "model": {"path": bad}, "train": TRAIN}),
        "train, lora": (["train"], {**plain, "model": {"path": bad, "lora": {"rank": 2}}, "train": TRAIN}),
        "live reference": (
            ["train"],
            {**dual, "model": {"path": sound}, "train": TRAIN, "reference": {"model": bad, "mode": "cpu"}},
        ),
        "score": (["score"], {**dual, "reference": {"model": bad}}),
        "score, folds": (["score"], {"objective": "dual_plus", "reference": {"folds": [sound, bad]}}),
        "audit": (["audit"], {"audit": {"models": {"a": bad}}}),
        "audit, second model": (["audit"], {"audit": {"models": {"a": sound, "b": bad}, "null_model": "b"}}),
        "audit, attack reference": (["audit"], {"audit": {"models": {"a": sound}, "attack_reference": bad}}),
        "interpolate": (["interpolate"], {"interpolate": {**interpolate, "model": bad}}),
        "interpolate, reference": (["interpolate"], {"interpolate": {**interpolate, "reference": bad}}),
        "interpolate, surrogate": (["interpolate"], {"interpolate": {**interpolate, "surrogate_reference": bad}}),
    }


WAYS = list(runs("", ""))
FAULTS = {
    "incomplete": "1 missing (model.layers.1.mlp.up_proj.weight)",
    "stranger": "its tokenizer has another vocabulary than the blocks'",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_verb_refuses_it(
    small_corpus: dict[str, Any], models: dict[str, str], tmp_path: Path, way: str, fault: str
) -> None:
    (verb,), sections = runs(models[fault], models["sound"])[way]
    run = write_run(tmp_path / "run.yaml", {"dir": small_corpus["dir"]}, **sections)
    target = [tmp_path / "made"] if verb == "interpolate" else []
    line = error_line(dualtok(verb, run, *target))
    assert FAULTS[fault] in line
    assert f"/{fault}" in line, "the folder is named"
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("train", [TRAIN, STAGES], ids=["zero", "pipeline"])
def test_two_ranks_refuse_it_too(
    small_corpus: dict[str, Any], models: dict[str, str], tmp_path: Path, train: dict[str, Any]
) -> None:
    run = write_run(
        tmp_path / "run.yaml",
        {"dir": small_corpus["dir"]},
        objective="causal_lm",
        model={"path": models["incomplete"]},
        train=train,
    )
    result = dualtok("train", run, ranks=2)
    assert result.returncode != 0
    assert "1 missing (model.layers.1.mlp.up_proj.weight)" in result.stderr
