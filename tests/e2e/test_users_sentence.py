"""The sentence that dualtok was asked for, as one run: ZeRO-3 shards inside the pipeline engine, a frozen reference in
host memory, blocks streamed from shards, and the dual loss, through the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.support import dualtok, partitioned_json, save_model, succeed, tiny_llama_config, write_run

if TYPE_CHECKING:
    from pathlib import Path

WIDE = 0.25
"""Standard deviation of the weights, as in tests/multi_rank/test_layout_parity.py: scores lie far apart."""
CLIPPING = 0.05
TRAIN = {
    "learning_rate": 1e-3,
    "batch_size": 8,
    "gradient_accumulation": 2,
    "steps": 12,
    "warmup_steps": 3,
    "gradient_clipping": CLIPPING,
    "epsilon": 1e-6,
    "precision": "fp32",
    "evaluation_blocks": 4,
}
SHARDED = {"engine": "sharded_pipeline", "pipeline": {"stages": 2}}
SEED = 5
"""One for which no token of these 12 steps lies within 1e-4 nats of a border; the parity test asserts it."""


def column(run: Path, name: str) -> np.ndarray:
    lines = (run.with_suffix("") / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([json.loads(line)[name] for line in lines])


@pytest.mark.slow
def test_sharded_pipeline_with_an_offloaded_reference_trains_as_one_process_with_stored_scores(
    small_corpus: dict[str, Any], tmp_path: Path
) -> None:
    reference = save_model(tmp_path / "reference", seed=7, initializer_range=WIDE)
    config = tiny_llama_config(num_hidden_layers=4, tie_word_embeddings=False, initializer_range=WIDE)
    common = {"seed": SEED, "objective": "dual", "model": {"config": config}}
    plain = write_run(tmp_path / "plain.yaml", small_corpus, reference={"model": str(reference)}, train=TRAIN, **common)
    succeed(dualtok("score", plain))
    succeed(dualtok("train", plain))
    asked = write_run(
        tmp_path / "asked.yaml",
        small_corpus,
        reference={"mode": "offload", "model": str(reference)},
        train={**TRAIN, **SHARDED, "deepspeed": partitioned_json(tmp_path)},
        **common,
    )
    succeed(dualtok("train", asked, ranks=4))
    for name in ("loss", "hard_loss", "memorized_loss", "plain_loss"):
        np.testing.assert_allclose(column(asked, name), column(plain, name), rtol=1e-5, err_msg=name)
    for name in ("hard_tokens", "memorized_tokens"):
        assert (column(plain, name) > 0).all(), f"no {name}, so nothing is compared"
        np.testing.assert_array_equal(column(asked, name), column(plain, name), err_msg=name)
    assert (column(plain, "gradient_norm") > CLIPPING).all(), "clipping was not active"
    np.testing.assert_allclose(column(asked, "gradient_norm"), column(plain, "gradient_norm"), rtol=1e-4)
