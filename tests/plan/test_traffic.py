"""Bytes sent per step: by hand, and against the collectives that real engines call."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from dualtok.plan.shape import read_shape
from dualtok.plan.traffic import Traffic, step_traffic
from tests.plan.support import CASES, LLAMA, SHAPE, job, job_of

N = SHAPE.parameters


@pytest.mark.parametrize(
    ("settings", "gathered", "reduced"),
    [
        ({"zero_stage": 0, "precision": "fp32"}, 0, 2 * 4 * N),
        ({"zero_stage": 1}, 2 * N, 2 * 2 * N),
        ({"zero_stage": 2}, 2 * N, 3 * 2 * 2 * N),
        ({"zero_stage": 3}, 3 * 2 * N, 3 * 2 * N),
        ({"zero_stage": 3, "max_reuse": 0}, 3 * 2 * 2 * N, 3 * 2 * N),
        ({"zero_stage": 3, "max_reuse": 2000}, 3 * 2 * (2 * N - 1000), 3 * 2 * N),
    ],
)
def test_three_micro_batches_on_four_ranks(settings: dict[str, Any], gathered: int, reduced: int) -> None:
    sent = step_traffic(SHAPE, job(ranks=4, micro_batches=3, **settings))
    assert sent == Traffic(gathered * 3 // 4, reduced * 3 // 4, 0)


def test_a_sharded_pipeline_gathers_for_every_pass_or_once() -> None:
    settings = {"ranks": 6, "stages": 3, "layers_per_stage": (1, 2, 2), "micro_batches": 4}
    passing = job(**settings, engine="sharded_pipeline")
    kept = job(**settings, engine="sharded_pipeline", keep_gathered=True)
    plain = job(**settings, engine="pipeline", zero_stage=1)
    one_way = 4 * 8 * 2 * 10
    assert step_traffic(SHAPE, passing, 1) == Traffic(2 * 4 * 2 * 200 // 2, 4 * 2 * 200 // 2, 2 * one_way)
    assert step_traffic(SHAPE, kept, 1) == Traffic(2 * 200 // 2, 4 * 2 * 200 // 2, 2 * one_way)
    assert step_traffic(SHAPE, plain, 1) == Traffic(2 * 200 // 2, 2 * 2 * 200 // 2, 2 * one_way)
    assert step_traffic(SHAPE, passing, 0).passed == step_traffic(SHAPE, passing, 2).passed == one_way


@pytest.mark.slow
def test_the_bytes_are_those_of_the_collectives_of_real_engines(measured: list[dict[str, Any]]) -> None:
    shape = read_shape(AutoConfig.for_model(**LLAMA))
    for case, found in zip(CASES, measured, strict=True):
        # Two ranks: half of what a collective gathers or reduces is sent by each, and by an all-reduce twice that.
        sent = {name: size // 2 for name, size in found["sent"].items()}
        planned = step_traffic(shape, job_of(case))
        gathered = sent.get("all_gather_into_tensor", 0) + sent.get("all_gather", 0)
        reduced = sent.get("reduce_scatter_tensor", 0) + sent.get("reduce", 0) + 2 * sent.get("all_reduce", 0)
        assert planned.gathered == pytest.approx(gathered, rel=0.02), case
        assert planned.reduced == pytest.approx(reduced, rel=0.02), case
