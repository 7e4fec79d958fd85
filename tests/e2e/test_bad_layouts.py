"""Layouts that cannot run: one clear line and status 2 on every rank within a minute, and no rank that hangs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests import warm
from tests.support import deepspeed_json, error_line, save_model, tiny_llama_config, without_launcher, write_run

if TYPE_CHECKING:
    from pathlib import Path

TRAIN = {
    "learning_rate": 1e-3,
    "batch_size": 4,
    "steps": 1,
    "precision": "fp32",
    "engine": "pipeline",
    "pipeline": {"stages": 2},
}


def lines_of_all_ranks(run: Path, *overrides: str, ranks: int = 2, **variables: str) -> list[str]:
    """Return the error line of each rank; each must end with status 2 by itself, within a minute."""
    return [error_line(result) for result in without_launcher("train", run, *overrides, ranks=ranks, **variables)]


def run_file(path: Path, corpus: dict[str, Any], **sections: Any) -> Path:
    return write_run(
        path,
        {"dir": corpus["dir"]},
        **{"objective": "causal_lm", "model": {"config": tiny_llama_config()}, "train": TRAIN, **sections},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.config.num_hidden_layers=1"], ["train.pipeline.stages", "2 stages", "1 decoder layers"]),
        (["train.pipeline.stages=3"], ["train.pipeline.stages", "3 stages cannot share 2 ranks"]),
        (["train.pipeline.balance=[2, 1]"], ["train.pipeline.balance", "sums to 3", "2 layers"]),
        (["train.pipeline=null"], ["train.pipeline: missing", "stages: 2"]),
        (["train.engine=zero"], ["train.pipeline", "has no effect with train.engine=zero"]),
        (["train.pipeline.keep_gathered=true"], ["train.pipeline.keep_gathered", "sharded_pipeline"]),
        ([f"train.deepspeed={deepspeed_json('zero2')}"], ["zero2.json", "stage is 2", "use stage 0 or 1"]),
        (
            ["train.engine=sharded_pipeline", f"train.deepspeed={deepspeed_json('zero1')}"],
            ["zero1.json", "stage is 1", "make it 3"],
        ),
    ],
)
def test_a_pipeline_that_cannot_be_built_is_named(
    small_corpus: dict[str, Any], tmp_path: Path, overrides: list[str], expected: list[str]
) -> None:
    for line in lines_of_all_ranks(run_file(tmp_path / "run.yaml", small_corpus), *overrides):
        for part in expected:
            assert part in line


@pytest.mark.slow
def test_a_model_without_a_plan_is_named(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    opt = {
        "model_type": "opt",
        "hidden_size": 32,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    run = run_file(tmp_path / "run.yaml", small_corpus, model={"config": opt})
    for line in lines_of_all_ranks(run):
        assert "no pipeline plan for 'opt'" in line
        assert "train.engine=zero" in line


@pytest.mark.slow
def test_selection_over_the_step_is_refused_in_a_pipeline(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    run = run_file(
        tmp_path / "run.yaml",
        small_corpus,
        objective="dual",
        selection={"scope": "step"},
        reference={"model": "unread"},
    )
    for line in lines_of_all_ranks(run):
        assert "selection.scope" in line
        assert "train.engine=pipeline" in line


@pytest.mark.slow
def test_a_reference_with_another_vocabulary_is_named(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    reference = save_model(tmp_path / "reference", seed=1, vocab_size=100)
    run = run_file(
        tmp_path / "run.yaml", small_corpus, objective="dual", reference={"model": str(reference), "mode": "offload"}
    )
    for line in lines_of_all_ranks(run):
        assert str(reference) in line
        assert "vocab_size is 100" in line


@pytest.mark.slow
def test_an_untested_deepspeed_is_refused_until_it_is_allowed(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    package = tmp_path / "packages" / "deepspeed-99.1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 99.1\n")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    run = run_file(tmp_path / "run.yaml", small_corpus)
    overrides = ["train.engine=sharded_pipeline", f"train.deepspeed={tmp_path / 'ds.json'}"]
    elsewhere = {warm.PACKAGES: str(package.parent)}
    for line in lines_of_all_ranks(run, *overrides, **elsewhere):
        assert "tested with DeepSpeed 0.19.8" in line
        assert "99.1 is installed" in line
        assert "allow_untested_deepspeed=true" in line
    allowed = without_launcher(
        "train", run, *overrides, "train.pipeline.allow_untested_deepspeed=true", ranks=2, timeout=240, **elsewhere
    )
    assert [result.returncode for result in allowed] == [0, 0], allowed[0].stderr
