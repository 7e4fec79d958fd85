"""The same training on other engines and ranks: equal losses and equal weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.support import (
    deepspeed_json,
    dualtok,
    partitioned_json,
    read_weights,
    relative_distance,
    save_model,
    succeed,
    tiny_llama_config,
    write_run,
)

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 20


@pytest.fixture(scope="module")
def reference(small_corpus: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score the small corpus with a reference model and return the model's folder."""
    folder = tmp_path_factory.mktemp("reference")
    model = save_model(folder / "model", seed=7)
    run = write_run(folder / "score.yaml", small_corpus, reference={"model": str(model)})
    succeed(dualtok("score", run))
    return model


def settings(small_corpus: dict[str, Any], reference: Path, path: Path, **train: Any) -> Path:
    """Write a dual run of 20 steps whose clipping is active and whose selection unlearns tokens."""
    return write_run(
        path, small_corpus, seed=3, objective="dual", model={"config": tiny_llama_config()},
        reference={"model": str(reference)}, monitor={"log_every": 5, "histogram_every": 0},
        train={"learning_rate": 1e-2, "batch_size": 16, "steps": STEPS, "precision": "fp32", "gradient_clipping": 0.05,
               "warmup_steps": 3, **train},
    )  # fmt: skip


def losses(run: Path) -> np.ndarray:
    """Return [step, loss, memorised tokens, gradient norm] of every step of a run."""
    lines = (run.with_suffix("") / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return np.array([[r["step"], r["loss"], r["memorised_tokens"], r["gradient_norm"]] for r in rows])


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_ranks_of_zero3_train_like_one_process_of_zero0(
    small_corpus: dict[str, Any], reference: Path, tmp_path: Path, accumulation: int
) -> None:
    alone = settings(small_corpus, reference, tmp_path / "alone.yaml", gradient_accumulation=accumulation,
                     deepspeed=deepspeed_json("zero0"))  # fmt: skip
    sharded = settings(small_corpus, reference, tmp_path / "sharded.yaml", gradient_accumulation=accumulation,
                       deepspeed=partitioned_json(tmp_path))  # fmt: skip
    succeed(dualtok("train", alone))
    succeed(dualtok("train", sharded, ranks=2))
    one, two = losses(alone), losses(sharded)
    assert len(one) == len(two) == STEPS
    assert one[:, 2].sum() > 0, "no token was unlearned, so the test would say little"
    assert (one[:, 3] > 0.05).all(), "clipping was not active"
    np.testing.assert_allclose(two[:, 1], one[:, 1], rtol=1e-5)
    for run in (alone, sharded):
        succeed(dualtok("export", run.with_suffix(""), run.with_suffix(".hf"), "--checkpoint", "latest"))
    weights = [read_weights(run.with_suffix(".hf")) for run in (alone, sharded)]
    assert relative_distance(*weights) < 1e-5
