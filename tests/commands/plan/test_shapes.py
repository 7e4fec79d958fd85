"""Both ways to a run's shapes agree, and what only transformers understands still reaches it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.commands.plan import shapes
from dualtok.commands.plan.shapes import Shapes, built_shapes, reference_shape, shapes_of
from dualtok.config.load import load_run
from dualtok.config.model import LoraConfig, ModelConfig
from dualtok.errors import ConfigError
from dualtok.plan.shape import read_shape
from tests.support import ROOT, tiny_llama_config

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

VOCABULARY = 300


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where :func:`shapes_of` goes the long way."""

    def refuse(*_: Any, **__: Any) -> Shapes:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(shapes, "built_shapes", refuse)  # the tests call the function itself


@pytest.mark.parametrize("run_file", sorted((ROOT / "launch" / "runs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_run_files_are_planned_without_transformers(run_file: Path, unbuilt: None) -> None:
    run = load_run(run_file)
    assert run.model is not None
    found = shapes_of(run.model, VOCABULARY)
    assert found.trained == built_shapes(run.model, VOCABULARY).trained
    if run.model.lora is not None:
        assert found.trained.adapters
        assert found.plain == built_shapes(run.model, VOCABULARY).plain


MODELS: dict[str, dict[str, Any]] = {
    "fresh": {"config": tiny_llama_config()},
    "fresh-with-vocabulary": {"config": tiny_llama_config(vocab_size=77)},
    "named": {"path": "some/where/pythia-160m"},
    "lora": {"config": tiny_llama_config(), "lora": LoraConfig(rank=4)},
    "lora-targets": {"config": tiny_llama_config(), "lora": LoraConfig(rank=4, targets=("v_proj", "down_proj"))},
    "gpt2-lora": {"path": "gpt2", "lora": LoraConfig(rank=2)},
}


@pytest.mark.parametrize("name", MODELS)
def test_settings_alone_give_what_the_built_model_gives(name: str, unbuilt: None) -> None:
    model = ModelConfig(**MODELS[name])
    assert shapes_of(model, VOCABULARY) == built_shapes(model, VOCABULARY)


def test_a_folder_is_read_and_what_is_not_understood_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PretrainedConfig] = []
    monkeypatch.setattr(shapes, "read_shape", lambda config, **more: asked.append(config) or read_shape(config, **more))
    model = ModelConfig(path=str(tmp_path))
    for changes, builds in (({}, 0), ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 1)):
        (tmp_path / "config.json").write_text(json.dumps({**tiny_llama_config(vocab_size=90), **changes}))
        asked.clear()
        assert shapes_of(model, VOCABULARY).plain.vocabulary == 90
        assert reference_shape(str(tmp_path)) == shapes_of(model, VOCABULARY).plain
        assert len(asked) == 3 * builds
    assert reference_shape(str(tmp_path / "none")) is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"config": tiny_llama_config(hidden_sise=3)}, "did you mean 'hidden_size'"),
        ({"config": tiny_llama_config(hidden_size=33)}, "not a multiple"),
        ({"config": tiny_llama_config(hidden_act="sillu")}, "no 'sillu' is known"),
        ({"config": {"model_type": "lama"}}, "did you mean"),
        ({"config": tiny_llama_config(), "lora": LoraConfig(targets=("q_prj",))}, "did you mean 'q_proj'"),
    ],
)
def test_a_mistake_is_named(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shapes_of(ModelConfig(**model), VOCABULARY)


def test_a_folder_with_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_llama_config()))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapter"):
        shapes_of(ModelConfig(path=str(tmp_path)), VOCABULARY)
