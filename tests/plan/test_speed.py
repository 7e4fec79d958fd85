"""The planner's seconds: by hand, and against published throughput."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dualtok.plan import hardware
from dualtok.plan.hardware import DEVICES, Cluster, Device
from dualtok.plan.shape import ModelShape
from dualtok.plan.speed import StepTime, model_flops, step_time, tokens_per_second
from tests.plan.support import SHAPE, job

DEVICE = Device(
    flops=1000.0, flops_fp32=100.0, memory_bandwidth=1e4, memory=1e9, link=100.0, pcie=10.0, linear=0.5, attention=0.25
)
CLUSTER = Cluster(DEVICE, nodes=1, gpus=4, gpu_memory=1e9, host_memory=1e9, network=10.0)
KEPT = 8 * (24 * 10 + 8 * 40)
"""Bytes that a layer of SHAPE keeps for 8 tokens."""


def seconds(cluster: Cluster = CLUSTER, **changes: Any) -> StepTime:
    return step_time(SHAPE, job(**{"ranks": 4, "skips_masked": True, **changes}), cluster)


def test_products_attention_and_elementwise_work_of_one_rank() -> None:
    logits = 8 * 100 * 4
    products = 8 * 6 * (500 + 1000) / 500  # 5 layers of 100 weights, a head of 1,000
    attention = 8 * 6 * (2 * 5 * 10) * 4 / 250
    moved = (5 * KEPT * 6 + 6 * logits) / 0.8e4
    assert seconds(ranks=1).compute == pytest.approx(products + attention + moved)
    again = seconds(ranks=1, activation_checkpointing=True).compute
    assert again - seconds(ranks=1).compute == pytest.approx(8 * 2 * 500 / 500 + attention / 3 + 5 * KEPT * 2 / 0.8e4)
    whole = seconds(ranks=1, skips_masked=False).compute
    assert whole - seconds(ranks=1).compute == pytest.approx(attention)
    assert seconds(ranks=1, precision="fp32").compute > 9 * products
    adapters = ModelShape(**{**SHAPE.__dict__, "adapters": ((5,),) * 5})
    frozen = step_time(adapters, job(ranks=1, skips_masked=True), CLUSTER)
    assert seconds(ranks=1).compute - frozen.compute == pytest.approx(products / 3)


def test_logits_beyond_the_budget_are_computed_twice() -> None:
    wide = ModelShape(**{**SHAPE.__dict__, "vocabulary": 2**20})
    twice, once = (step_time(wide, job(ranks=1, loss_memory_mib=mib), CLUSTER).compute for mib in (8, 32))
    assert twice - once == pytest.approx(8 * 2 * 2**20 * 10 * 0.75 / 500)


def test_rings_pass_the_slowest_link_and_pay_for_every_hop() -> None:
    base, local, remote = hardware.COLLECTIVE_BASE, hardware.HOP_LOCAL, hardware.HOP_REMOTE
    assert CLUSTER.ring(80.0, 4, 3) == pytest.approx(1.0 + 3 * (base + 3 * local))
    assert CLUSTER.ring(80.0, 8, 0) == pytest.approx(10.0)
    assert CLUSTER.ring(0.0, 8, 1) == pytest.approx(base + 6 * local + 2 * remote)
    assert CLUSTER.ring(80.0, 1, 3) == 0.0
    assert CLUSTER.to_neighbor_stage(80.0, 2) == pytest.approx(1.0)
    assert CLUSTER.to_neighbor_stage(80.0, 4) == pytest.approx(80 / 0.8 / 2.5)


def test_zero3_hides_a_part_of_its_communication_and_others_none() -> None:
    visible = seconds(micro_batches=1, max_reuse=0).communication
    assert visible == pytest.approx(hardware.OVERLAPPED * seconds(max_reuse=0, overlap=False).communication)
    sent = (2 + 1) * 2 * SHAPE.parameters * 3 // 4
    assert visible == pytest.approx(hardware.OVERLAPPED * sent / 80, rel=1e-3)
    assert seconds(zero_stage=1).communication == pytest.approx(3 * 2 * SHAPE.parameters * 3 / 4 / 80, rel=1e-3)


def test_a_pipeline_waits_for_its_slowest_stage() -> None:
    cut = {"stages": 2, "engine": "pipeline", "zero_stage": 1, "layers_per_stage": (3, 2), "micro_batches": 6}
    time = seconds(**cut)
    assert time.bubble == pytest.approx(time.compute / 6)
    longer = seconds(**{**cut, "stages": 4, "layers_per_stage": (1, 1, 1, 2)})
    assert longer.bubble == pytest.approx(3 * longer.compute / 6)
    sharded = seconds(**{**cut, "engine": "sharded_pipeline", "zero_stage": 3})
    kept = seconds(**{**cut, "engine": "sharded_pipeline", "zero_stage": 3, "keep_gathered": True})
    assert sharded.communication > kept.communication > time.communication


def test_offloading_costs_copies_and_host_bandwidth() -> None:
    share = SHAPE.parameters / 4
    on_device, on_host = seconds().optimizer, seconds(offload_optimizer="cpu").optimizer
    assert on_device == pytest.approx(30 * share / 0.8e4)
    assert on_host == pytest.approx(30 * share * 4 / hardware.HOST_MEMORY_BANDWIDTH + 6 * share / 8)
    assert seconds(offload_optimizer="nvme").optimizer > on_host
    more = seconds(offload_parameters="cpu", max_reuse=0).communication - seconds(max_reuse=0).communication
    assert more == pytest.approx(hardware.OVERLAPPED * 2 * 2 * share / 8, rel=1e-3)


def test_references_cost_a_forward_pass_or_nothing() -> None:
    forward = 8 * (2 * 1500 / 500 + 2 * 100 * 4 / 250)
    assert seconds(reference="stored").reference == seconds().reference == 0
    assert seconds(reference="resident").reference == pytest.approx(forward)
    assert seconds(reference="adapter").reference == pytest.approx(forward)
    assert seconds(reference="offload").reference > forward
    assert seconds(reference="resident", reference_precision="fp32").reference > forward
    assert seconds(scores_step=True, micro_batches=2).reference == pytest.approx(2 * forward)
    slow_host = step_time(SHAPE, job(ranks=4, reference="cpu"), CLUSTER, SHAPE)
    assert slow_host.reference == 0  # this accelerator is slower than any host


def test_reading_shows_unless_workers_hide_it() -> None:
    assert seconds(data_workers=1).reading == 0
    assert seconds().reading == pytest.approx(8 * 4 * 4 / hardware.STORAGE_PER_HOST)
    assert seconds(reference="stored").reading == pytest.approx(2 * 8 * 4 * 4 / hardware.STORAGE_PER_HOST)


def test_throughput_and_utilisation_count_as_usual() -> None:
    assert tokens_per_second(job(ranks=4, micro_batches=3, rows=2), 2.0) == 4 * 3 * 16 / 2
    assert model_flops(SHAPE, 8) == 6 * 1500 + 6 * 100 * 4


def test_more_bandwidth_is_never_slower() -> None:
    for changes in ({}, {"zero_stage": 1}, {"stages": 2, "engine": "sharded_pipeline", "layers_per_stage": (3, 2)}):
        slow = seconds(replace(CLUSTER, nodes=2, gpus=2), ranks=4, **changes).total
        fast = seconds(replace(CLUSTER, nodes=2, gpus=2, network=1e9), ranks=4, **changes).total
        assert fast <= slow
    assert DEVICES["h200"].memory_bandwidth > DEVICES["h100"].memory_bandwidth
