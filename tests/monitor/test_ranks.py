"""The figures of a table of ranks, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from dualtok.monitor.devices import peak_tflops
from dualtok.monitor.ranks import Efficiency, RankTable, RankTimes
from dualtok.monitor.timing import PHASES, StepTimes


def rank(wall: float = 1.0, *, busy: float = 0.0, figures: dict[str, Any] | None = None, **phases: float) -> RankTimes:
    missing = wall - sum(phases.values())
    return RankTimes(wall, {**dict.fromkeys(PHASES, 0.0), "other": missing, **phases}, busy, **(figures or {}))


def test_the_slowest_rank_is_the_one_that_others_wait_for() -> None:
    table = RankTable([rank(forward=0.3, communication=0.6), rank(data=0.7, forward=0.3), rank(communication=0.6)])
    values = table.scalars()
    assert values["ranks/slowest"] == 1
    assert values["ranks/slowest_ratio"] == pytest.approx(1.0 / 0.4)
    assert values["time/data"] == pytest.approx(0.7 / 3)
    assert values["time_max/data"] == 0.7
    assert values["time/communication"] == pytest.approx(0.4)
    assert "time/reference" not in values, "a phase that no rank was in"
    assert "pipeline/bubble" not in values
    assert "ranks/slowest" not in RankTable([rank()]).scalars()


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (2, 4), (4, 8)])
def test_the_bubble_of_equal_stages_is_that_of_1f1b(stages: int, micro_batches: int) -> None:
    """Stage p waits from its first input on; stage 0 waits in the middle and has the longest schedule."""
    busy, schedule = micro_batches, micro_batches + stages - 1
    table = RankTable(
        [rank(2.0 * schedule, busy=busy, pipeline=schedule - busy - p / 2) for p in range(stages)], stages
    )
    assert table.scalars()["pipeline/bubble"] == pytest.approx((stages - 1) / (micro_batches + stages - 1))


def test_utilisation_counts_the_blocks_of_a_pipeline_once() -> None:
    ranks = [rank(2.0, figures={"tokens": 500.0}), rank(1.0, figures={"tokens": 500.0})]
    work = Efficiency(flops_per_token=1e9, peak_tflops=0.5)
    assert RankTable(ranks).utilization(work) == pytest.approx(1000 * 1e9 / (2.0 * 2 * 0.5e12))
    assert RankTable(ranks, stages=2).utilization(work) == pytest.approx(500 * 1e9 / (2.0 * 2 * 0.5e12))


def test_reading_ahead_is_told_by_the_rank_that_has_least_and_by_all_shards_together() -> None:
    ahead = [{"queue_depth": 8.0, "shards_opened": 3, "shards_ready": 3}, {"queue_depth": 1.5, "shards_opened": 1}]
    values = RankTable([rank(figures=figures) for figures in ahead]).scalars()
    assert (values["data/queue_depth"], values["data/prefetch_hit_rate"]) == (1.5, 0.75)
    assert not RankTable([rank()]).scalars().keys() & {"data/queue_depth", "data/prefetch_hit_rate"}


def test_figures_travel_whole() -> None:
    times = StepTimes(steps=4, wall=8.0, phases={"data": 2.0, "other": 6.0}, busy=1.0)
    one = RankTimes.of(times, tokens=12.0, queue_depth=None, shards_opened=3)
    assert (one.wall, one.phases["data"], one.phases["forward"], one.busy) == (2.0, 0.5, 0.0, 0.25)
    assert RankTimes.of_row(one.row()) == one
    entry = RankTable([one], hosts=["here"]).entry(40, 4)
    assert (entry["step"], entry["steps"], entry["slowest"]) == (40, 4, 0)
    assert entry["ranks"][0] == {
        "rank": 0,
        "host": "here",
        "wall": 2.0,
        **dict.fromkeys(PHASES, 0.0),
        "data": 0.5,
        "other": 1.5,
        "busy": 0.25,
        "own": 2.0,
        "tokens": 12.0,
        "queue_depth": None,
        "shards_opened": 3,
        "shards_ready": 0,
    }


def test_known_devices_have_a_peak_and_others_none() -> None:
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops("NVIDIA H100 80GB HBM3") == peak_tflops("NVIDIA H200") == 989
    assert peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA GeForce RTX 4090") is None
