"""Which layouts a run could have on some machines, which of them fit, and which is fastest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dualtok.plan.hardware import RUNTIME, USABLE
from dualtok.plan.memory import estimate_memory, split_evenly
from dualtok.plan.speed import step_time, tokens_per_second

if TYPE_CHECKING:
    from dualtok.plan.hardware import Cluster
    from dualtok.plan.memory import Job, MemoryEstimate, OffloadDevice
    from dualtok.plan.shape import ModelShape
    from dualtok.plan.speed import StepTime

SplitLayers = Callable[[int], tuple[int, ...]]
"""Number of stages -> decoder layers of each."""
MOST_MICRO_BATCHES = 256
"""More micro-batches per step are not tried, except the run's own."""


@dataclass(frozen=True)
class Option:
    """A layout on a cluster."""

    job: Job
    memory: MemoryEstimate
    time: StepTime
    device_room: float
    """Bytes of the accelerator that the fullest rank leaves free; negative if it does not fit."""
    host_room: float
    """Bytes of memory that the fullest host leaves free."""

    @property
    def fits(self) -> bool:
        """Whether all ranks and hosts have room."""
        return self.device_room >= 0 and self.host_room >= 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks together."""
        return tokens_per_second(self.job, self.time.total)

    @property
    def name(self) -> str:
        """The layout in a few words, e.g. ``pipeline 4 x ZeRO-1, checkpointing``."""
        return layout_name(self.job)


def layout_name(job: Job) -> str:
    """Return a layout in a few words."""
    if job.engine == "zero":
        words = [f"ZeRO-{job.zero_stage}"]
    elif job.engine == "pipeline":
        words = [f"pipeline {job.stages} x ZeRO-{job.zero_stage}"]
    else:
        words = [f"sharded pipeline {job.stages}" + (", kept gathered" if job.keep_gathered else "")]
    if job.offload_optimizer != "none":
        words.append(f"optimizer to {_where(job.offload_optimizer)}")
    if job.offload_parameters != "none":
        words.append(f"weights to {_where(job.offload_parameters)}")
    if job.activation_checkpointing:
        words.append("checkpointing")
    return ", ".join(words)


def weigh(shape: ModelShape, job: Job, cluster: Cluster, reference: ModelShape | None = None) -> Option:
    """Return a layout's memory and time on a cluster.

    Args:
        shape: sizes of the model.
        job: layout, batch and precision.
        cluster: the machines.
        reference: sizes of a reference that computes while training.

    Raises:
        ValueError: the layers do not fit the stages.
    """
    memory = estimate_memory(shape, job, reference)
    room = USABLE * cluster.gpu_memory - RUNTIME - memory.largest.total.device
    host = cluster.host_memory - memory.per_host(cluster.gpus).host
    return Option(job, memory, step_time(shape, job, cluster, reference), room, host)


def rank_layouts(
    shape: ModelShape,
    job: Job,
    cluster: Cluster,
    reference: ModelShape | None = None,
    divide: SplitLayers | None = None,
) -> list[Option]:
    """Return all layouts of a job, those that fit first, the fastest of them before others.

    The step's tokens stay what they are. Tried are ZeRO 0-3, offloading, pipelines of each number of stages that
    divides the ranks, activation checkpointing, and every number of micro-batches that shares the batch evenly.

    Args:
        shape: of the model in training.
        job: the run's own layout, whose batch and settings are kept.
        cluster: the machines; all of their accelerators are used.
        reference: shape of the reference model.
        divide: how layers are dealt to stages; None deals equally.
    """
    layers_of_stages = divide or (lambda stages: split_evenly(len(shape.layers), stages))
    blocks = job.replicas * job.rows * job.micro_batches
    options = [
        weigh(shape, candidate, cluster, reference)
        for spread in _spreads(job, len(shape.layers), cluster, layers_of_stages)
        for candidate in _batched(spread, blocks, job.micro_batches)
    ]
    return sorted(options, key=lambda option: (not option.fits, _order(option, job.micro_batches)))


def _order(option: Option, own: int) -> tuple[float, ...]:
    """Fast before slow; of those that do not fit, the nearest to fitting first.

    Times within 2 % count as equal: the run's own number of micro-batches comes first then, and the simpler layout.
    """
    if not option.fits:
        return (-min(option.device_room, option.host_room),)
    job, time = option.job, round(math.log(option.time.total) / 0.02)
    offloads = (job.offload_optimizer != "none") + (job.offload_parameters != "none")
    simple = (job.micro_batches != own, job.stages, offloads, job.activation_checkpointing, job.zero_stage)
    return (float(time), *map(float, simple), float(job.micro_batches))


def _spreads(job: Job, layers: int, cluster: Cluster, layers_of_stages: SplitLayers) -> Iterator[Job]:
    """Yield the layouts of the ranks, each with the batch still to be set."""
    plain = replace(
        job,
        ranks=cluster.ranks,
        engine="zero",
        stages=1,
        layers_per_stage=None,
        keep_gathered=False,
        offload_parameters="none",
        offload_optimizer="none",
        zero_stage=3,
    )
    lowest = 0 if job.precision == "fp32" else 1
    for stage in range(lowest, 3 if job.quantized else 4):
        yield replace(plain, zero_stage=stage)
    if not job.quantized:
        positions: tuple[tuple[OffloadDevice, OffloadDevice], ...] = (("cpu", "none"), ("cpu", "cpu"), ("nvme", "cpu"))
        for optimizer, parameters in positions:
            yield replace(plain, offload_optimizer=optimizer, offload_parameters=parameters)
    if job.scores_step:
        return
    for stages in range(2, layers + 1):
        if cluster.ranks % stages:
            continue
        cut = replace(plain, engine="pipeline", stages=stages, layers_per_stage=layers_of_stages(stages), zero_stage=1)
        yield cut
        if not job.quantized:
            sharded = replace(cut, engine="sharded_pipeline", zero_stage=3)
            yield sharded
            yield replace(sharded, keep_gathered=True)


def _batched(job: Job, blocks: int, own: int) -> Iterator[Job]:
    """Yield a layout with every way to cut a step's blocks into micro-batches, with and without checkpointing."""
    if blocks % job.replicas:
        return
    rows = blocks // job.replicas
    for micro_batches in range(1, rows + 1):
        if rows % micro_batches or (micro_batches > MOST_MICRO_BATCHES and micro_batches != own):
            continue
        for again in (False, True):
            yield replace(job, rows=rows // micro_batches, micro_batches=micro_batches, activation_checkpointing=again)


def _where(device: OffloadDevice) -> str:
    return "host" if device == "cpu" else "files"
