"""Shadow models as training runs: planned by the run's own recipe, trained once, and LiRA finds an overfit model."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from dualtok.commands.audit.shadows import shadow_runs, train_shadows
from dualtok.commands.export import export
from dualtok.config.data import DataConfig
from dualtok.config.load import load_run, parse_run
from dualtok.data.folder import DataFolder
from dualtok.data.folds import in_shadow
from dualtok.data.manifest import load_manifest
from dualtok.data.prepare.pipeline import prepare
from dualtok.data.sources.corpora import sotu_passages, write_jsonl
from dualtok.errors import ConfigError, DualtokError
from tests.support import BLOCK_LENGTH, VOCABULARY, dualtok, save_model, succeed, tiny_llama_config, write_run

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.config.run import RunConfig

RECIPE: dict[str, Any] = {
    "objective": "causal_lm",
    "model": {"config": tiny_llama_config()},
    "train": {"learning_rate": 1e-2, "batch_size": 16, "epochs": 12, "warmup_steps": 4, "precision": "fp32"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the ``data`` section of 160 passages of about one block each, most of them members or non-members."""
    folder = tmp_path_factory.mktemp("short")
    texts = [passage[:120] for passage in islice(sotu_passages(), 160)]
    section: dict[str, Any] = {
        "dir": str(folder / "prepared"),
        "source": str(write_jsonl(texts, folder / "short.jsonl")),
        "block_length": BLOCK_LENGTH,
        "lanes": 4,
        "vocab_size": VOCABULARY,
        "processes": 1,
        "shares": {"train": 0.4, "reference": 0.1, "validation": 0.1, "held_out": 0.4},
    }
    prepare(DataConfig(**section), progress=False)
    return section


def train(run: RunConfig, folder: Path, processes: int) -> list[Path]:
    return train_shadows(run, DataFolder.of_run(run.data), folder, processes)


def run_of(data: dict[str, Any], folder: Path, **changes: Any) -> RunConfig:
    audit = {"models": {"m": "m"}, "shadows": 4, **changes.pop("audit", {})}
    return parse_run({"data": data, "output_dir": str(folder), **RECIPE, "audit": audit, **changes})


def test_a_shadow_is_the_runs_own_recipe_with_as_many_passes(data: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(data, tmp_path, seed=5, reference={"model": "r"})
    manifest = load_manifest(data["dir"])
    members, others = manifest.splits["train"].blocks, manifest.splits["held_out"].blocks
    shadows = shadow_runs(run, manifest, tmp_path)
    assert [shadow.run.seed for shadow in shadows] == [6, 7, 8, 9]
    for shadow in shadows:
        assert shadow.steps == round(round(12 * members / 16) * (members + others) / 2 / members)
        # The reference would serve monitoring alone.
        assert (shadow.run.objective, shadow.run.reference, shadow.run.model) == ("causal_lm", None, run.model)
        assert shadow.run.train is not None
        assert run.train is not None
        as_before: dict[str, Any] = {"epochs": 12, "steps": None, "warmup_steps": 4}
        assert replace(shadow.run.train, **as_before) == run.train
        assert shadow.run.train.warmup_steps == round(4 * (members + others) / 2 / members)
        assert shadow.run.data.dir == str(shadow.folder / "data")
    dual = run_of(data, tmp_path, objective="dual", reference={"model": "r", "splits": ["train", "held_out"]})
    (first, *_) = shadow_runs(dual, manifest, tmp_path)
    assert first.run.reference is not None
    assert (first.run.reference.model, first.run.reference.splits) == ("r", ("train",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": None}, "`dualtok audit --shadows` needs the section 'train'"),
        ({"model": None}, "`dualtok audit --shadows` needs the section 'model'"),
        ({"objective": "dual"}, "needs the section 'reference'"),
        (
            {"objective": "dual_plus", "reference": {"folds": ["a", "b"]}},
            "shadows of 'dual_plus' would not be interpolated",
        ),
        ({"train": {**RECIPE["train"], "split": "reference"}}, "audit.members: 'train', but train.split"),
        ({"train": {**RECIPE["train"], "leave_out": {"fold": 0, "folds": 2}}}, "did not learn all members"),
    ],
)
def test_a_run_that_does_not_say_how_members_were_learned_is_refused(
    data: dict[str, Any], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    run = run_of(data, tmp_path, **changes)
    with pytest.raises(ConfigError, match=words):
        train(run, tmp_path, 1)
    assert not any(tmp_path.iterdir())


def test_all_is_written_first_and_another_recipe_refused(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as launched:
        launched.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="4 of 4 shadow models are not there"):
            train(run_of(data, tmp_path), tmp_path, 1)
    assert not any(tmp_path.iterdir())

    broken = run_of(data, tmp_path, model={"path": str(tmp_path / "no-such-model")})
    with pytest.raises(DualtokError, match=r"`dualtok train .*shadow\.yaml --auto-resume` failed: .*no-such-model"):
        train(broken, tmp_path, 1)
    pool = {split: DataFolder(data["dir"]).documents(split)["doc"].to_numpy() for split in ("train", "held_out")}
    documents = np.concatenate(list(pool.values()))
    for number in range(4):
        table = DataFolder(tmp_path / str(number) / "data").documents("train")
        assert set(table["doc"].to_pylist()) == set(documents[in_shadow(documents, number, broken.seed)].tolist())
        assert (tmp_path / str(number) / "shadow.yaml").is_file()
    for split, ids in pool.items():
        share = in_shadow(ids, 0, broken.seed).mean()
        assert 0.25 < share < 0.75, f"half of {split}"

    other = run_of(data, tmp_path, model={"path": str(tmp_path / "another")})
    with pytest.raises(ConfigError, match=r"model\.path: .*another.* but the shadow model in .*0 has .*no-such-model"):
        train(other, tmp_path, 1)
    swapped = replace(broken, audit=replace(broken.audit, non_members="reference"))
    with pytest.raises(ConfigError, match="made for other members or non-members, or another seed"):
        train(swapped, tmp_path, 1)


@pytest.mark.slow
def test_an_overfit_model_is_found_and_no_shadow_is_trained_twice(
    data: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = write_run(tmp_path / "plain.yaml", data, **RECIPE)
    succeed(dualtok("train", target))
    export(target.with_suffix(""), tmp_path / "model", which="latest")
    save_model(tmp_path / "reference", 5)
    audit = {
        "models": {"plain": str(tmp_path / "model")},
        "attack_reference": str(tmp_path / "reference"),
        "shadow_checkpoint": "latest",
        "attacks": ["loss"],
        "bootstrap_resamples": 100,
        "fpr_targets": [0.2],
    }
    run = write_run(tmp_path / "audit.yaml", data, **RECIPE, audit=audit)
    folder = run.with_suffix("") / "audit" / "shadows"
    train(load_run(run, ["audit.shadows=2"]), folder, 1)
    assert "2 of 2 shadow models to train, 50 steps each" in capfd.readouterr().out
    trained = times(folder)
    assert len(trained) == 2

    # A model that was lost is exported anew from its checkpoint; two further shadows leave the first ones alone.
    weights = folder / "1" / "model-latest" / "model.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    (folder / "1" / "model-latest").rename(tmp_path / "lost")
    shown = succeed(dualtok("audit", run, "--shadows", 4))
    assert "3 of 4 shadow models to train" in shown
    assert "LiRA out" in shown
    assert "Shadow" in shown
    assert weights.read_bytes() == before
    assert len(times(folder)) == 4
    assert times(folder) | trained == times(folder), "a shadow was trained again"

    found = json.loads((run.with_suffix("") / "audit" / "audit.json").read_text())
    assert found["settings"]["shadows"] == 4
    auc = {attack["name"]: attack["auc"]["value"] for attack in found["models"][0]["attacks"]}
    assert list(auc) == ["loss", "lira", "lira_offline", "shadow_classifier"]
    assert min(auc["lira"], auc["lira_offline"]) > max(0.75, auc["loss"])
    assert auc["shadow_classifier"] > 0.75

    succeed(dualtok("audit", run, "--shadows", 4, "audit.attacks=[loss,lt_mia]"))
    (again,) = json.loads((run.with_suffix("") / "audit" / "audit.json").read_text())["models"]
    assert [attack["name"] for attack in again["attacks"]] == ["loss", "lt_mia"]
    assert again["not_run"] == {}

    all_there, once = load_run(run, ["audit.shadows=4"]), times(folder)
    assert train(all_there, folder, 1) == [folder / str(number) / "model-latest" for number in range(4)]
    assert times(folder) == once
    settings = yaml.safe_load((folder / "3" / "shadow.yaml").read_text())
    assert settings["seed"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{"lora": {"rank": 2}}, {"ia3": {}}], ids=["lora", "ia3"])
def test_shadows_of_adapters_are_whole_models(data: dict[str, Any], tmp_path: Path, adapter: dict[str, Any]) -> None:
    base = save_model(tmp_path / "base", 3)
    recipe = RECIPE["train"] | {"epochs": None, "steps": 2, "warmup_steps": 0}
    run = run_of(data, tmp_path, model={"path": str(base), **adapter}, train=recipe, audit={"shadows": 2})
    for folder in train(run, tmp_path / "shadows", 1):
        shadow, start = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, base))
        assert any(not torch.equal(shadow[name], value) for name, value in start.items())


def times(folder: Path) -> dict[str, int]:
    """Return when each shadow's history was last written."""
    return {file.parent.name: file.stat().st_mtime_ns for file in folder.glob("*/metrics.jsonl")}
