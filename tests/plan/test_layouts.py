"""Which layouts are tried, which fit, and how they are ranked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dualtok.plan.hardware import DEVICES, GIB, RUNTIME, USABLE, Cluster
from dualtok.plan.layouts import rank_layouts, weigh
from dualtok.plan.scaling import scale
from dualtok.plan.shape import ModelShape
from tests.plan.support import job

LAYERS = 8
SHAPE = ModelShape(
    first=(32_000_000,),
    layers=((12_000_000,),) * LAYERS,
    last=(1000, 32_000_000),
    tied=0,
    hidden=1000,
    feed_forward=4000,
    vocabulary=32_000,
    gated=True,
)
OWN = job(ranks=8, length=1024, rows=2, micro_batches=4)


def cluster(memory: float, host: float = 1e12, nodes: int = 1, gpus: int = 8) -> Cluster:
    return Cluster(DEVICES["h100"], nodes, gpus, memory, host, 50e9)


def test_every_layout_trains_on_the_steps_blocks_and_the_fastest_that_fits_comes_first() -> None:
    options = rank_layouts(SHAPE, OWN, cluster(80 * GIB))
    assert {option.job.replicas * option.job.rows * option.job.micro_batches for option in options} == {64}
    fitting = [option for option in options if option.fits]
    assert options[: len(fitting)] == fitting
    fastest = min(option.time.total for option in fitting)
    assert fitting[0].time.total <= 1.03 * fastest
    engines = {(option.job.engine, option.job.zero_stage) for option in options}
    assert engines == {("zero", 1), ("zero", 2), ("zero", 3), ("pipeline", 1), ("sharded_pipeline", 3)}
    assert {option.job.stages for option in options} == {1, 2, 4, 8}


def test_times_within_two_per_cent_go_to_the_runs_own_micro_batches() -> None:
    best = rank_layouts(SHAPE, job(ranks=1, length=1024, rows=1, micro_batches=8), cluster(80 * GIB, gpus=1))[0]
    assert best.job.micro_batches == 8
    assert best.job.zero_stage == 1
    assert best.job.offload_optimizer == "none"


def test_what_fits_is_decided_by_device_and_host() -> None:
    need = weigh(SHAPE, OWN, cluster(80 * GIB)).memory.largest.total.device
    enough = (need + RUNTIME) / USABLE
    assert weigh(SHAPE, OWN, cluster(enough + 1e6)).fits
    assert not weigh(SHAPE, OWN, cluster(enough - 1e6)).fits
    offloaded = replace(OWN, offload_optimizer="cpu", offload_parameters="cpu")
    on_host = weigh(SHAPE, offloaded, cluster(80 * GIB)).memory.per_host(8).host
    assert weigh(SHAPE, offloaded, cluster(80 * GIB, on_host + 1)).fits
    assert not weigh(SHAPE, offloaded, cluster(80 * GIB, on_host - 1)).fits


def test_where_none_fits_the_nearest_comes_first() -> None:
    options = rank_layouts(SHAPE, OWN, cluster(1 * GIB))
    assert not any(option.fits for option in options)
    rooms = [min(option.device_room, option.host_room) for option in options]
    assert rooms == sorted(rooms, reverse=True)


def test_4_bit_weights_and_step_scope_leave_some_layouts_out() -> None:
    adapters = replace(SHAPE, adapters=((1000,),) * LAYERS)
    quantized = rank_layouts(adapters, replace(OWN, quantized=True, zero_stage=2), cluster(80 * GIB))
    assert {(option.job.engine, option.job.zero_stage) for option in quantized} == {
        ("zero", 1),
        ("zero", 2),
        ("pipeline", 1),
    }
    whole = weigh(adapters, replace(OWN, zero_stage=2), cluster(80 * GIB)).memory.largest.parameters.device
    halves = weigh(adapters, replace(OWN, zero_stage=2, quantized=True), cluster(80 * GIB)).memory.largest
    assert whole - halves.parameters.device == pytest.approx(LAYERS * 12_000_000 * (2 - 0.5625), rel=1e-6)
    step = rank_layouts(SHAPE, replace(OWN, scores_step=True), cluster(80 * GIB))
    assert {option.job.engine for option in step} == {"zero"}


def test_scaling_keeps_the_batch_until_each_replica_has_one_block() -> None:
    points = scale(SHAPE, "zero3", cluster(80 * GIB), length=1024, tokens=64 * 1024, counts=(8, 64, 256))
    assert [point.tokens for point in points] == [64 * 1024, 64 * 1024, 256 * 1024]
    assert all(sum(point.shares.values()) == pytest.approx(1) for point in points)
    exposed = [point.shares["exposed communication"] for point in points]
    assert exposed == sorted(exposed)
    cut = scale(SHAPE, "sharded_pipeline", cluster(80 * GIB), length=1024, tokens=64 * 1024, counts=(8,))
    assert cut[0].option.job.engine == "sharded_pipeline"
    assert cut[0].shares["pipeline bubble"] > 0
    assert scale(SHAPE, "zero3", cluster(1 * GIB), length=1024, tokens=64 * 1024, counts=(8,)) == []
