"""The run's YAML: strict keys, types, overrides, and errors that name the place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml

from dualtok.config.load import load_run, parse_run
from dualtok.errors import ConfigError
from dualtok.objective.loss import CausalLM, Dual, build_objective
from dualtok.objective.selection import SelectionConfig

if TYPE_CHECKING:
    from pathlib import Path

RUN: dict[str, Any] = {
    "data": {"dir": "shards"},
    "model": {"path": "base"},
    "train": {"learning_rate": 1e-3, "batch_size": 8, "steps": 10},
    "reference": {"model": "ref"},
}


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    return path


def test_defaults_are_those_of_the_paper(run_file: Path) -> None:
    run = load_run(run_file)
    assert run.objective == "dual"
    assert run.selection is None
    run = load_run(run_file, ["selection={}"])
    assert run.selection is not None
    shares = (run.selection.hard_share, run.selection.memorized_share, run.selection.tau, run.selection.alpha)
    assert shares == (0.6, 0.2, 0.0, 0.8)


def test_overrides_replace_values_and_make_sections(run_file: Path) -> None:
    run = load_run(run_file, ["train.steps=20", "selection.alpha=0.5", "train.learning_rate=1e-4", "seed=7"])
    assert run.train is not None
    assert run.selection is not None
    assert (run.train.steps, run.train.learning_rate, run.selection.alpha, run.seed) == (20, 1e-4, 0.5, 7)


def test_a_run_survives_its_own_yaml(run_file: Path) -> None:
    run = load_run(run_file, ["selection.alpha=0.5"])
    assert parse_run(yaml.safe_load(run.to_yaml())) == run


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batchsize=4", ["'train.batchsize'", "did you mean 'batch_size'"]),
        ("selektion.alpha=1", ["'selektion'", "did you mean 'selection'"]),
        ("selection.hard_shar=.5", ["'selection.hard_shar'", "did you mean 'hard_share'"]),
        ("train.steps=ten", ["train.steps", "'ten'"]),
        ("train.learning_rate=-1", ["train.learning_rate", "-1"]),
        ("train.precision=fp16", ["train.precision", "'fp16'"]),
        ("model.lora={rnak: 4}", ["'model.lora.rnak'", "did you mean 'rank'?"]),
        ("objective=plain", ["objective", "'plain'"]),
        ("selection.hard_share=0.9", ["selection", "0.9"]),
        ("train.epochs=2", ["train", "exactly one of 'steps' and 'epochs'"]),
        ("train.gradient_accumulation=3", ["train.batch_size", "train.gradient_accumulation"]),
        ("train.split=held_out", ["train.split", "held_out"]),
        (
            "train={learning_rate: 1e-3, batch_size: 8, steps: 10, precision: fp32, loss_backend: cut_cross_entropy}",
            ["train.loss_backend", "no gradients in fp32", "set precision: bf16, or loss_backend: torch"],
        ),
        ("model.config={model_type: llama}", ["model", "exactly one of 'path'"]),
    ],
)
def test_a_bad_setting_is_named(run_file: Path, override: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(run_file, [override])
    message = str(caught.value)
    assert message.startswith(str(run_file))
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_all_mistakes_are_listed_unknown_keys_first(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "data": {"dri": "data", "block_length": 1},
                "seed": -1,
                "objektive": "dual",
                "train": {"learning_rate": "fast", "batch_size": 8, "steps": 3},
            }
        )
    )
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: 6 problems: (1) unknown key ")
    assert "\n" not in message
    parts = message.partition("6 problems: ")[2].split("; (")
    assert {part.split(") ", 1)[1] for part in parts[:2]} == {
        "unknown key 'data.dri' (did you mean 'dir'?)",
        "unknown key 'objektive' (did you mean 'objective'?)",
    }
    for part in ("data.dir: missing; add it", "data.block_length: ", "seed: ", "train.learning_rate: ", "got 'fast'"):
        assert part in message


@pytest.mark.parametrize(
    ("objective", "section", "expected"),
    [
        ("causal_lm", "selection={alpha: 0.5}", "selection: has no effect"),
        ("dual", "goldfish={}", "goldfish: has no effect"),
        ("selective", "selection={alpha: 0.5}", "selection.alpha: has no effect"),
    ],
)
def test_a_setting_without_effect_is_refused(run_file: Path, objective: str, section: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_run(run_file, [f"objective={objective}", section])


def test_dual_plus_needs_scales_or_a_cross_fitted_reference(run_file: Path) -> None:
    for reference in ("reference={model: reference}", "reference=null"):
        with pytest.raises(ConfigError, match=r"model\.ia3: objective 'dual_plus' .* as reference\.folds"):
            load_run(run_file, ["objective=dual_plus", reference])
    scales = load_run(run_file, ["objective=dual_plus", "reference=null", "model.ia3={}"])
    assert isinstance(build_objective(scales.loss, scales.selection, scales.goldfish), CausalLM)
    with pytest.raises(ConfigError, match="selection: has no effect with objective 'dual_plus'"):
        load_run(run_file, ["objective=dual_plus", "reference=null", "model.ia3={}", "selection={alpha: 0.5}"])
    run = load_run(run_file, ["objective=dual_plus", "reference={folds: [a, b]}", "selection={alpha: 0.5}"])
    assert build_objective(run.loss, run.selection) == Dual(SelectionConfig(alpha=0.5))


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_run(tmp_path / "absent.yaml")
    for content, expected in [
        ("train: [", "not valid YAML"),
        ("- a", "mapping"),
        ("seed: 1\nseed: 2", "appears twice"),
    ]:
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        with pytest.raises(ConfigError, match=expected):
            load_run(path)


def test_a_malformed_override_is_named(run_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load_run(run_file, ["train.steps"])
    with pytest.raises(ConfigError, match="'seed' is a value"):
        load_run(run_file, ["seed=1", "seed.x=2"])


def test_a_missing_section_is_named_with_the_verb(run_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"dualtok score.*'reference'"):
        load_run(run_file, ["reference=null"]).need("reference", "score")
