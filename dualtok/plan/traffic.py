"""What each rank sends per optimizer step, in bytes.

A ring all-gather or reduce-scatter of S bytes over D ranks sends (D - 1) / D S from each rank, an all-reduce twice that
(ZeRO, arXiv 1910.02054, section 7). S as counted on DeepSpeed 0.19.8, with the symbols of :mod:`dualtok.plan.memory`
and M micro-batches:

==============================  =====================================  ==================================
layout                          parameters gathered                    gradients
==============================  =====================================  ==================================
ZeRO-0                          none                                   one all-reduce of w N per step
ZeRO-1                          w N per step                           one all-reduce of w N per step
ZeRO-2                          w N per step                           M all-reduces of w N
ZeRO-3                          2 M w N, less what stays gathered      M reduce-scatters of w N
sharded pipeline                2 M w N                                M reduce-scatters of w N
sharded pipeline, kept          w N per step                           M reduce-scatters of w N
==============================  =====================================  ==================================

ZeRO-2 could send half as much: DeepSpeed reduces its buckets to all ranks and drops what the others own
(``use_multi_rank_bucket_allreduce``). With activation checkpointing ZeRO-3 gathers for the second forward pass, and the
backward pass right after it uses that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dualtok.plan.memory import split_evenly

if TYPE_CHECKING:
    from dualtok.plan.memory import Job
    from dualtok.plan.shape import ModelShape


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends per optimizer step."""

    gathered: int
    """All-gathers of parameters."""
    reduced: int
    """Reductions of gradients."""
    passed: int
    """Activations and their gradients to the neighboring stages."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.gathered + self.reduced + self.passed


def step_traffic(shape: ModelShape, job: Job, stage: int = 0) -> Traffic:
    """Return what a rank of a stage sends per optimizer step, the reference and the selection's few bytes excepted.

    Args:
        shape: of the model.
        job: layout and batch.
        stage: pipeline stage.
    """
    layers = job.layers_per_stage or split_evenly(len(shape.layers), job.stages)
    elements, w, replicas, times = sum(shape.stage(layers, stage)), job.weight_bytes, job.replicas, job.micro_batches
    ring = (replicas - 1) / replicas
    if job.zero_stage == 3:
        each = 2 * elements - min(elements, job.stays_gathered)
        gathered, reduced = w * (elements if job.keep_gathered else times * each), times * w * elements
    else:
        gathered = w * elements if job.zero_stage else 0
        reduced = 2 * w * elements * (times if job.zero_stage == 2 else 1)
    neighbors = (stage > 0) + (stage < job.stages - 1)
    passed = neighbors * times * job.tokens * w * shape.hidden
    return Traffic(round(ring * gathered), round(ring * reduced), passed)
