"""Whole training runs with a live reference: the same steps and evaluations as with stored scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support import dualtok, history, partitioned_json, save_model, succeed, tiny_llama_config, write_run

if TYPE_CHECKING:
    from pathlib import Path

TRAIN = {
    "learning_rate": 1e-2,
    "batch_size": 8,
    "gradient_accumulation": 2,
    "steps": 4,
    "precision": "fp32",
    "gradient_clipping": 0.05,
    "evaluation_blocks": 12,
}
PIPELINE = {"engine": "pipeline", "pipeline": {"stages": 2}}
SHARDED = {"engine": "sharded_pipeline", "pipeline": {"stages": 2}}


@pytest.fixture(scope="module")
def stored(small_corpus: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a finished run with stored scores, and its reference model."""
    folder = tmp_path_factory.mktemp("stored")
    model = save_model(folder / "reference", seed=7, initializer_range=0.1)
    run = write_run(
        folder / "run.yaml",
        {"dir": small_corpus["dir"]},
        model={"config": tiny_llama_config()},
        train=TRAIN,
        reference={"model": str(model)},
    )
    succeed(dualtok("score", run))
    succeed(dualtok("train", run))
    return run, model


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        ("cpu", 1, {}),
        ("offload", 2, {"deepspeed": "zero3"}),
        ("resident", 2, {}),
        ("cpu", 2, PIPELINE),
        ("offload", 2, PIPELINE),
        ("resident", 2, SHARDED),
        ("cpu", 2, SHARDED),
    ],
    ids=str,
)
def test_a_live_reference_trains_as_a_stored_one(
    small_corpus: dict[str, Any], tmp_path: Path, stored: tuple[Path, Path], case: tuple[str, int, dict[str, Any]]
) -> None:
    (mode, ranks, engine), (expected, model) = case, stored
    if engine.get("deepspeed") or engine is SHARDED:
        engine = {**engine, "deepspeed": partitioned_json(tmp_path)}
    run = write_run(
        tmp_path / "run.yaml",
        {"dir": small_corpus["dir"]},
        model={"config": tiny_llama_config()},
        train={**TRAIN, **engine},
        reference={"mode": mode, "model": str(model)},
    )
    succeed(dualtok("train", run, ranks=ranks))
    steps, wanted = history(run, "metrics.jsonl"), history(expected, "metrics.jsonl")
    assert len(steps) == len(wanted) == TRAIN["steps"]
    assert any(step["memorized_tokens"] for step in wanted), "nothing is unlearned, so nothing is compared"
    for step, other in zip(steps, wanted, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert (step["hard_tokens"], step["memorized_tokens"]) == (other["hard_tokens"], other["memorized_tokens"])
    found, there = history(run, "evaluations.jsonl")[-1], history(expected, "evaluations.jsonl")[-1]
    assert found["ref_auc"] == pytest.approx(there["ref_auc"], abs=1e-3)


@pytest.mark.slow
def test_adapters_train_alike_in_every_engine(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", seed=3, initializer_range=0.25)
    runs = {}
    for name, ranks, engine in (
        ("zero", 1, {}),
        ("pipeline", 2, PIPELINE),
        ("sharded", 4, {**SHARDED, "deepspeed": partitioned_json(tmp_path)}),
    ):
        run = write_run(
            tmp_path / f"{name}.yaml",
            {"dir": small_corpus["dir"]},
            model={"path": str(base), "lora": {"rank": 4, "alpha": 8}},
            reference={"mode": "adapter"},
            train={**TRAIN, **engine},
        )
        succeed(dualtok("train", run, ranks=ranks))
        runs[name] = history(run, "metrics.jsonl")
    for name in ("pipeline", "sharded"):
        for step, other in zip(runs[name], runs["zero"], strict=True):
            assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert step["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
    assert runs["zero"][-1]["loss"] != runs["zero"][0]["loss"]
