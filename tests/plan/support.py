"""Models and engines that the planner's tests share."""

from __future__ import annotations

from typing import Any

from dualtok.plan.memory import Job
from dualtok.plan.shape import ModelShape

SHAPE = ModelShape(
    first=(1000,),
    layers=((70, 30),) * 5,
    last=(10, 1000),
    tied=0,
    hidden=10,
    feed_forward=40,
    vocabulary=100,
    gated=True,
)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 515,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
SMALL = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
STAGE_3 = {
    "stage": 3,
    **SMALL,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 1000,
    "stage3_max_live_parameters": 1000,
    "sub_group_size": 40_000,
}
CASES: list[dict[str, Any]] = [
    *({"precision": "fp32", "zero": {"stage": stage, **SMALL}} for stage in (0, 1, 2)),
    *({"precision": "bf16", "zero": {"stage": stage, **SMALL}} for stage in (1, 2)),
    {"precision": "fp32", "zero": STAGE_3},
    {"precision": "bf16", "zero": {**STAGE_3, "stage3_max_reuse_distance": 0}},
    {
        "precision": "bf16",
        "zero": {**STAGE_3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
    },
]
"""Engines that measure_states.py builds on two ranks, each taking steps of two micro-batches."""


def job(**changes: Any) -> Job:
    """Return a job of two ranks."""
    return Job(**{"ranks": 2, "length": 8, "rows": 1, "reference": "none", **changes})


def job_of(case: dict[str, Any]) -> Job:
    """Return the job that a case is."""
    zero = case["zero"]
    return job(
        zero_stage=zero["stage"],
        precision=case["precision"],
        micro_batches=2,
        offload_parameters=zero.get("offload_param", {}).get("device", "none"),
        offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none"),
        max_reuse=zero.get("stage3_max_reuse_distance", 1_000_000_000),
    )
