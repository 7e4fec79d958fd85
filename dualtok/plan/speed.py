"""How long an optimizer step takes: a roofline with the shares of :mod:`dualtok.plan.hardware`, part by part.

Per token, with N weights that are multiplied (decoder and head), a multiply-adds of attention per position and t
positions attended to:

* matrix products with weights: 2 N FLOP forward, 4 N backward (2 N where the weights are frozen), and 2 N once more
  with activation checkpointing; logits that do not fit ``loss_memory_mib`` are computed twice.
* attention: 2 a t forward, twice that backward. t is half the block where the kernel leaves out hidden positions
  (FlashAttention), else the whole block.
* elementwise work: each byte that a layer keeps (:mod:`dualtok.plan.memory`) is written and read in the forward pass
  and moved four times in the backward pass; memory bandwidth bounds it. Logits are moved six times.
* the optimizer: 30 bytes per trained element that a rank holds (master weight and moments read and written, gradient
  read, weight written), by device memory, host memory or disk.
* communication: :mod:`dualtok.plan.traffic`, in rings. ZeRO-3 overlaps it with computation, which hides a part
  (:data:`~dualtok.plan.hardware.OVERLAPPED`); what is not overlapped (``overlap_comm`` false, pipelines) adds in full.
* the bubble: a pipeline of P stages and M micro-batches takes M + P - 1 times its slowest stage (1F1B).
* a live reference: its forward pass; ``offload`` also copies the weights over PCIe once per pass; ``cpu`` counts where
  the host is slower than the step. Stored losses are read with the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from dualtok.plan import hardware
from dualtok.plan.memory import MIB, activation_bytes, split_evenly
from dualtok.plan.traffic import step_traffic

if TYPE_CHECKING:
    from dualtok.plan.hardware import Cluster
    from dualtok.plan.memory import Job
    from dualtok.plan.shape import ModelShape

OPTIMIZER_BYTES = 30
"""Bytes moved per trained element: 2 x 12 of master weight and moments, 4 of gradient, 2 of weight."""
SWAPPED_BYTES = 32
"""Bytes moved to and from files per element: gradient, master weight and two moments, both ways."""
TOKEN_BYTES = 4
"""Bytes of a token in a shard, and of its stored reference loss."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, as the slowest rank sees it; the parts add up."""

    compute: float
    """Forward, backward and recomputation on the accelerator."""
    communication: float
    """What of the communication is not hidden behind computation."""
    bubble: float
    """Idle stages of a pipeline."""
    optimizer: float
    reference: float
    """Scoring by a live reference, and the scoring pass of ``selection.scope: step``."""
    reading: float
    """Reading of tokens and scores that is not hidden behind the step."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(float(getattr(self, field.name)) for field in fields(self))


def step_time(shape: ModelShape, job: Job, cluster: Cluster, reference: ModelShape | None = None) -> StepTime:
    """Return the time of an optimizer step.

    Args:
        shape: of the model in training.
        job: layout and batch.
        cluster: the machines.
        reference: shape of the reference model; None takes the model's own.
    """
    layers = job.layers_per_stage or split_evenly(len(shape.layers), job.stages)
    times = [_micro_batch(shape, job, cluster, layers, stage) for stage in range(job.stages)]
    compute, sent = max(times, key=sum)
    passes = job.micro_batches
    bubble = (job.stages - 1) * (compute + (sent if job.engine == "sharded_pipeline" else 0.0))
    optimizer = max(_optimizer(shape, job, cluster, layers, stage) for stage in range(job.stages))
    scoring = _scoring(shape, reference or shape, job, cluster)
    busy = passes * compute + passes * sent + bubble + optimizer + scoring
    if job.reference == "cpu":
        scoring += max(0.0, _host_scoring(reference or shape, job, cluster) - busy)
    return StepTime(passes * compute, passes * sent, bubble, optimizer, scoring, _reading(job, cluster, busy))


def tokens_per_second(job: Job, seconds: float) -> float:
    """Return the tokens that all ranks together train on per second."""
    return job.replicas * job.micro_batches * job.tokens / seconds


def model_flops(shape: ModelShape, length: int) -> float:
    """Return FLOP per token as model FLOP utilization counts them: 6 N and causal attention, nothing recomputed.

    Frozen weights count as trained, as is usual.
    """
    return 6 * shape.multiplied + 6 * shape.attended * length / 2


def forward_seconds(
    shape: ModelShape, tokens: float, length: int, cluster: Cluster, precision: str, *, skips: bool = False
) -> float:
    """Return the seconds of a forward pass without gradients over some tokens on one accelerator.

    Args:
        shape: sizes of the model.
        tokens: how many run through it.
        length: tokens of a block, for the cost of attention.
        cluster: its devices and what share of their speed is reached.
        precision: ``bf16`` or ``fp32``.
        skips: whether attention's kernel skips the half of the scores that is masked.
    """
    device, seen = cluster.device, length / 2 if skips else length
    products = 2 * shape.multiplied / device.products(precision)
    return tokens * (products + 2 * shape.attended * seen / device.attentions(precision))


def _micro_batch(
    shape: ModelShape, job: Job, cluster: Cluster, layers: tuple[int, ...], stage: int
) -> tuple[float, float]:
    """Return the seconds of computation and of visible communication per micro-batch on a stage."""
    device, again = cluster.device, 1 if job.activation_checkpointing else 0
    share = layers[stage] / len(shape.layers)
    weights = share * sum(map(sum, shape.layers))
    backward = 1 if shape.adapters else 2
    products = 2 * weights * (1 + backward + again)
    seen = job.length / 2 if job.skips_masked else job.length
    attention = 2 * share * shape.attended * seen * (3 + again)
    kept = activation_bytes(shape, job.with_checkpointing(False), layers[stage])
    moved = kept * (6 + 2 * again)
    if stage == job.stages - 1:
        logits = job.tokens * shape.vocabulary * 4
        twice = 1 - min(1.0, job.loss_memory_mib * MIB / logits)
        products += 2 * shape.vocabulary * shape.hidden * (1 + backward + twice)
        moved += 6 * logits
    compute = job.tokens * products / device.products(job.precision)
    compute += job.tokens * attention / device.attentions(job.precision)
    compute += moved / (device.memory_bandwidth * hardware.MEMORY_SHARE)
    return compute, _communication(shape, job, cluster, layers, stage) / job.micro_batches


def _communication(shape: ModelShape, job: Job, cluster: Cluster, layers: tuple[int, ...], stage: int) -> float:
    """Return the visible seconds of communication per step of a rank of a stage."""
    sent = step_traffic(shape, job, stage)
    per_pass = layers[stage] + 1
    if job.zero_stage == 3:
        passes = job.micro_batches
        gathers = per_pass if job.keep_gathered else 2 * passes * per_pass
        collectives = gathers + passes * per_pass
    else:
        buckets = 1 + sum(shape.stage(layers, stage)) // job.reduce_bucket
        collectives = buckets * (1 + (job.micro_batches if job.zero_stage == 2 else 1))
    rings = cluster.ring(sent.gathered + sent.reduced, job.replicas, collectives)
    rings += _copied(shape, job, cluster, layers, stage)
    if job.overlaps:
        rings *= hardware.OVERLAPPED
    return rings + cluster.to_neighbor_stage(sent.passed, job.replicas)


def _copied(shape: ModelShape, job: Job, cluster: Cluster, layers: tuple[int, ...], stage: int) -> float:
    """Return the seconds in which a rank copies its share of offloaded weights to the accelerator."""
    if job.offload_parameters == "none":
        return 0.0
    share = job.weight_bytes * sum(shape.stage(layers, stage)) / job.replicas
    bandwidth = cluster.device.pcie * hardware.PCIE_SHARE
    if job.offload_parameters == "nvme":
        bandwidth = min(bandwidth, hardware.NVME_BANDWIDTH / cluster.gpus)
    return 2 * job.micro_batches * share / bandwidth


def _optimizer(shape: ModelShape, job: Job, cluster: Cluster, layers: tuple[int, ...], stage: int) -> float:
    held = shape.stage_adapters(layers, stage) or shape.stage(layers, stage)
    share = sum(held) / (job.replicas if job.zero_stage else 1)
    if job.offload_optimizer == "none":
        return OPTIMIZER_BYTES * share / (cluster.device.memory_bandwidth * hardware.MEMORY_SHARE)
    adam = OPTIMIZER_BYTES * share * cluster.gpus / hardware.HOST_MEMORY_BANDWIDTH
    copies = (4 * job.micro_batches + job.weight_bytes) * share / (cluster.device.pcie * hardware.PCIE_SHARE)
    swapped = SWAPPED_BYTES * share * cluster.gpus / hardware.NVME_BANDWIDTH
    return adam + copies + (swapped if job.offload_optimizer == "nvme" else 0.0)


def _scoring(shape: ModelShape, reference: ModelShape, job: Job, cluster: Cluster) -> float:
    """Return the seconds per step that an accelerator spends on the scores of its share of the blocks."""
    blocks = job.micro_batches * job.rows / job.stages  # the stages of a replica share its rows
    tokens = blocks * job.length
    seconds, skips = 0.0, job.skips_masked
    if job.scores_step:
        seconds += forward_seconds(
            shape, job.micro_batches * job.tokens, job.length, cluster, job.precision, skips=skips
        )
    if job.reference == "adapter":
        seconds += forward_seconds(shape, tokens, job.length, cluster, job.precision, skips=skips)
    if job.reference in ("resident", "offload"):
        precision = job.reference_precision
        seconds += forward_seconds(reference, tokens, job.length, cluster, precision, skips=skips)
    if job.reference == "offload" or (job.reference == "resident" and job.reference_sharded):
        size = (4 if job.reference_precision == "fp32" else 2) * reference.parameters
        passes = -(-blocks // job.reference_rows)
        seconds += passes * cluster.ring(size * (job.ranks - 1) / job.ranks, job.ranks, len(reference.layers) + 1)
        if job.reference == "offload":
            seconds += passes * size / job.ranks / (cluster.device.pcie * hardware.PCIE_SHARE)
    return seconds


def _host_scoring(reference: ModelShape, job: Job, cluster: Cluster) -> float:
    """Return the seconds in which a rank's share of a host's cores scores its blocks of a step."""
    tokens = job.micro_batches * job.tokens / job.stages
    flops = 2 * reference.multiplied + 2 * reference.attended * job.length
    return tokens * flops * cluster.gpus / hardware.HOST_FLOPS


def _reading(job: Job, cluster: Cluster, busy: float) -> float:
    """Return the seconds by which reading is longer than the step that hides it, or all without data workers."""
    each = TOKEN_BYTES * (2 if job.reference == "stored" else 1)
    tokens = job.micro_batches * job.tokens
    per_host = tokens * each * cluster.gpus / hardware.STORAGE_PER_HOST
    together = tokens * each * cluster.ranks / hardware.STORAGE
    seconds = max(per_host, together)
    return max(0.0, seconds - busy) if job.data_workers else seconds
