"""Memory of a run per rank and host, from the model's shape alone: nothing is allocated, nothing is read.

Model states follow ZeRO (Rajbhandari et al. 2020, section 3): with N parameters on a stage and D data-parallel ranks,
parameters N, gradients N and AdamW's master copy and moments, each divided by D from ZeRO-3, -2 and -1 on. Activations
follow Korthikanti et al. 2022, section 4, for an attention that keeps no scores (their "selective recomputation") and
without dropout. All sizes are bytes.

Legend: N parameters of a stage, D data-parallel ranks, P stages, n = tokens of a micro-batch on one rank, d hidden,
f intermediate, v vocabulary, e bytes per element (2 in bf16, 4 in fp32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from dualtok.model.stages import StageBounds, cut, cut_plan, empty_causal_lm, layer_costs
from dualtok.objective.linear_cross_entropy import LOSS_MEMORY_MIB, WORKING_SHARE, chunk_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FP32 = 4
ADAM_MOMENTS = 2
SWAP_BUFFERS = 4
"""Sub-groups of fp32 values in memory while the optimiser's states lie in files: master, two moments, gradient."""

Where = Literal["none", "cpu", "nvme"]
Mode = Literal["none", "stored", "offload", "cpu", "resident", "adapter"]


@dataclass(frozen=True)
class Job:
    """What of a run decides its memory."""

    ranks: int
    """All ranks; the data-parallel ones are ``ranks / stages``."""
    engine: Literal["zero", "pipeline", "sharded_pipeline"] = "zero"
    """As ``train.engine``."""
    stages: int = 1
    """Pipeline stages P."""
    balance: str | Sequence[int] = "cost"
    """How layers are dealt to stages, as ``train.pipeline.balance``."""
    zero_stage: int = 0
    """ZeRO stage; 3 in a sharded pipeline."""
    keep_gathered: bool = False
    """As ``train.pipeline.keep_gathered``."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """As ``train.precision``."""
    rows: int = 1
    """Blocks per micro-batch and rank."""
    length: int = 1024
    """Tokens per block."""
    accumulation: int = 1
    """Micro-batches per optimiser step."""
    activation_checkpointing: bool = False
    """Whether each layer keeps its input only."""
    loss_memory_mib: float = LOSS_MEMORY_MIB
    """Budget for logits."""
    offload_parameters: Where = "none"
    """Where ZeRO-3's shards of parameters lie."""
    offload_optimizer: Where = "none"
    """Where master weights, moments and accumulated gradients lie."""
    reference: Mode = "stored"
    """As ``reference.mode``."""
    reference_precision: Literal["fp32", "bf16"] = "fp32"
    """As ``reference.precision``."""
    reference_sharded: bool = False
    """Whether a resident reference is sharded by ZeRO-3."""
    ranks_per_host: int = 8
    """Ranks that share a host's memory."""
    bucket: int = 500_000_000
    """``reduce_bucket_size``, elements."""
    sub_group: int = 1_000_000_000
    """``sub_group_size``, elements."""

    @property
    def data_parallel(self) -> int:
        """Data-parallel ranks D."""
        return self.ranks // self.stages


@dataclass(frozen=True)
class Parts:
    """Bytes of one rank in one memory."""

    parameters: int = 0
    """Weights or this rank's shard of them."""
    gradients: int = 0
    """Gradients that wait for the optimiser."""
    optimizer: int = 0
    """Master weights and moments."""
    activations: int = 0
    """What the forward passes in flight keep for their backward passes."""
    head: int = 0
    """Logits."""
    reference: int = 0
    """The reference model's weights."""
    buffers: int = 0
    """Gathered weights, whole gradients of the module at work, reduction and swap buffers."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class StageMemory:
    """One rank of one stage."""

    stage: int
    """Place in the pipeline."""
    parameters: int
    """Parameters N of the stage, elements."""
    device: Parts
    """In the memory of the rank's device."""
    host: Parts
    """In host memory, because of offloading or the reference."""


@dataclass(frozen=True)
class MemoryEstimate:
    """All stages; the ranks of a stage are alike."""

    stages: tuple[StageMemory, ...]
    """In pipeline order."""
    host_total: int
    """Bytes of offloaded tensors on the fullest host."""

    @property
    def device_peak(self) -> int:
        """Bytes on the fullest device."""
        return max(stage.device.total for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class _Shape:
    """A stage as arithmetic sees it; elements."""

    parameters: int
    layers: int
    largest: int  # parameters of the largest module that is gathered at once
    hidden: int
    intermediate: int
    vocabulary: int
    is_last: bool


def estimate_memory(config: PretrainedConfig, job: Job) -> MemoryEstimate:
    """Return the memory of a run.

    Args:
        config: of a causal language model.
        job: layout and settings.

    Raises:
        ConfigError: the model cannot be cut into the job's stages.
    """
    shapes, whole = _shapes(config, job)
    stages = []
    for stage, shape in enumerate(shapes):
        device, host = _states(shape, job)
        device["activations"] = _activations(shape, job, stage)
        device["head"] = _head(shape, job) if shape.is_last else 0
        for memory, parts in (("device", device), ("host", host)):
            parts["reference"] = _reference(whole, job, memory)
        stages.append(StageMemory(stage, shape.parameters, Parts(**device), Parts(**host)))
    return MemoryEstimate(tuple(stages), _host_total(stages, job))


def model_state_bytes(parameters: int, job: Job) -> tuple[int, int, int]:
    """Return the bytes of parameters, gradients and optimiser per rank at the end of a micro-batch.

    Master weights are a copy of their own also in fp32, from ZeRO-1 on; at ZeRO-0 in fp32 the weights are their own
    master. Gradients are accumulated in fp32.
    """
    e, shards = _itemsize(job.precision), job.data_parallel
    share = -(-parameters // shards)
    held = share if job.zero_stage == 3 and not job.keep_gathered else parameters
    if job.zero_stage == 3 and job.keep_gathered:
        held += share  # the shard stays beside the whole
    gradients = FP32 * (share if job.zero_stage >= 2 else parameters)
    if job.zero_stage == 0 and job.precision == "fp32":
        return e * held, gradients, FP32 * ADAM_MOMENTS * parameters
    return e * held, gradients, FP32 * (1 + ADAM_MOMENTS) * (share if job.zero_stage >= 1 else parameters)


def _states(shape: _Shape, job: Job) -> tuple[dict[str, int], dict[str, int]]:
    """Return what device and host hold of the model's states, and the buffers around them."""
    parameters, gradients, optimizer = model_state_bytes(shape.parameters, job)
    e, share = _itemsize(job.precision), -(-shape.parameters // job.data_parallel)
    device, host = {"parameters": parameters}, dict.fromkeys(("parameters", "gradients", "optimizer", "buffers"), 0)
    bucket = e * min(job.bucket, shape.parameters) if job.zero_stage else 0
    device |= {"gradients": gradients, "optimizer": optimizer, "buffers": bucket}
    if job.zero_stage == 3:
        device["buffers"] += 2 * e * shape.largest  # its weights gathered, and their gradients
    elif job.precision == "bf16":
        device["buffers"] += e * shape.parameters  # the gradients of one micro-batch, before they are added up
    if job.offload_parameters == "cpu":
        host["parameters"], device["parameters"] = parameters, 0
    elif job.offload_parameters == "nvme":
        device["parameters"] = 0
    if job.offload_optimizer != "none":
        # ZeRO-3 accumulates in one flat buffer; for states in memory AdamW is given a copy, else the sub-group's.
        host["gradients"], device["gradients"], device["optimizer"] = gradients, 0, 0
        if job.offload_optimizer == "cpu":
            host["optimizer"], host["gradients"] = optimizer, 2 * gradients
        else:
            largest = max(min(job.sub_group, share), -(-shape.largest // job.data_parallel))
            host["buffers"] = SWAP_BUFFERS * FP32 * min(largest, share)
    return device, host


def _activations(shape: _Shape, job: Job, stage: int) -> int:
    """Return what the micro-batches in flight keep: min(P - p, accumulation) under 1F1B, else one.

    A layer keeps per token e (8 d + 4 f) bytes (both norms' results, queries, keys and values as attention takes them,
    its result, both residuals; gate, up, activation and their product) and both norms' inputs in float32. Under
    activation checkpointing it keeps e d, and one layer at a time is whole.
    """
    e, tokens = _itemsize(job.precision), job.rows * job.length
    layer = tokens * (e * (8 * shape.hidden + 4 * shape.intermediate) + FP32 * 2 * shape.hidden)
    in_flight = min(job.stages - stage, job.accumulation) if job.stages > 1 else 1
    if job.activation_checkpointing:
        return in_flight * shape.layers * tokens * e * shape.hidden + layer
    return in_flight * shape.layers * layer


def _head(shape: _Shape, job: Job) -> int:
    """Return the logits that :func:`linear_cross_entropy` holds: kept ones, and a chunk at work in either pass."""
    e, tokens = _itemsize(job.precision), job.rows * job.length
    size = chunk_rows(job.loss_memory_mib, shape.vocabulary, e)
    kept = min(tokens, (WORKING_SHARE - 1) * size)
    return e * shape.vocabulary * (kept + min(size, tokens))


def _reference(parameters: int, job: Job, memory: str) -> int:
    """Return the bytes per rank of a reference as large as the model: stored, none and adapter hold none."""
    e = _itemsize(job.reference_precision)
    if job.reference == "resident" and memory == "device":
        return e * (-(-parameters // job.ranks) if job.reference_sharded else parameters)
    if job.reference == "offload" and memory == "host":
        return e * -(-parameters // job.ranks)
    if job.reference == "cpu" and memory == "host":
        return e * parameters
    return 0


def _host_total(stages: Sequence[StageMemory], job: Job) -> int:
    ranks = [stages[rank // job.data_parallel].host.total for rank in range(job.ranks)]
    return max(sum(ranks[first : first + job.ranks_per_host]) for first in range(0, job.ranks, job.ranks_per_host))


def _shapes(config: PretrainedConfig, job: Job) -> tuple[list[_Shape], int]:
    """Return each stage's shape, and the parameters of the whole model."""
    model = empty_causal_lm(config, "sdpa")
    text = model.config.get_text_config()
    whole = sum(parameter.numel() for parameter in model.parameters())
    embedding, head = model.get_input_embeddings().weight.numel(), model.get_output_embeddings().weight.numel()
    tied = bool(text.tie_word_embeddings)
    hidden = int(text.hidden_size)
    intermediate = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    common = {"hidden": hidden, "intermediate": intermediate, "vocabulary": int(text.vocab_size)}
    if job.stages == 1:
        layers, _ = layer_costs(model, cut_plan(config))
        return [_Shape(whole, len(layers), max(embedding, head, *layers), is_last=True, **common)], whole
    layers, cost = layer_costs(model, cut_plan(config))
    bounds: list[StageBounds] = cut(layers, cost, job.stages, job.balance)
    final = sum(p.numel() for name in cut_plan(config).final for p in getattr(model.base_model, name).parameters())
    first = whole - sum(layers) - final - (0 if tied else head)
    shapes = []
    for each in bounds:
        own = layers[each.first : each.stop]
        ends = first * each.is_first + (final + head) * each.is_last
        largest = max(*own, embedding * each.is_first, head * each.is_last)
        shapes.append(_Shape(sum(own) + ends, len(own), largest, is_last=each.is_last, **common))
    return shapes, whole


def _itemsize(precision: str) -> int:
    return 2 if precision == "bf16" else FP32
