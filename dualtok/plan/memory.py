"""Memory of a training job: what each rank holds on its device, in host memory and on disk.

Symbols: N elements of the parameters that a rank's stage works with, D data-parallel ranks of the stage, P stages,
w bytes of a weight (4 in fp32, 2 in bf16), n tokens of a micro-batch on one rank, h hidden, f feed-forward.

Model states follow ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 5), with what DeepSpeed 0.19.8 really
allocates where that differs; gradients are accumulated in float32, as dualtok always does:

=================  ===============  =======================================  ==========================
ZeRO stage         parameters       gradients                                optimizer
=================  ===============  =======================================  ==========================
0 (fp32)           w N              4 N                                      8 N
1                  w N              4 N, in bf16 also w N of the last pass   12 N / D
2                  w N              4 N / D                                  12 N / D
3                  w N / D          4 N / D                                  12 N / D
3, offloaded       w N / D          4 N / D, and 4 N / D for the optimizer   12 N / D
=================  ===============  =======================================  ==========================

DeepSpeed keeps float32 master weights apart from the weights even where both are float32, hence 12 = 4 + 4 + 4.

Activations follow Korthikanti et al. 2022 (arXiv 2205.05198, equation 2: 34 n h bytes per layer and 5 n a t for the
attention matrix), without dropout masks (2 n h) and without the attention matrix, which fused attention never keeps:
w (8 h + 2 f) n with LayerNorm and a plain feed-forward network, ((8 + 8 w) h + 4 w f) n with RMSNorms, which
transformers computes in float32, and a gated one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from dualtok.plan.shape import ModelShape

Engine = Literal["zero", "pipeline", "sharded_pipeline"]
OffloadDevice = Literal["none", "cpu", "nvme"]
Reference = Literal["none", "stored", "offload", "cpu", "resident", "adapter"]
Precision = Literal["fp32", "bf16"]

MIB = 2**20
HOST_LOGITS_MIB = 256
"""Logits that a reference on host cores holds: what the loss takes on a CPU where no setting names it."""
STATE = 4
"""Bytes of a master weight, a moment, or an accumulated gradient: float32."""
NF4 = 0.5 + 4 / 64
"""Bytes of a weight in 4 bits: half a byte, and a float32 scale per block of 64 (Dettmers et al. 2023, section 2)."""
SWAP_BUFFERS = 4
"""Sub-groups that DeepSpeed's swapper holds in host memory: weight, gradient and two moments."""


@dataclass(frozen=True)
class Bytes:
    """Bytes by place. Where ranks compute on host cores, the device is host memory too."""

    device: int = 0
    host: int = 0
    disk: int = 0

    def __add__(self, other: Bytes) -> Bytes:
        """Add place by place."""
        return Bytes(self.device + other.device, self.host + other.host, self.disk + other.disk)


@dataclass(frozen=True)
class Job:
    """What decides the memory of a job, apart from the model."""

    ranks: int
    """All ranks of the job."""
    length: int
    """Tokens per block."""
    rows: int
    """Blocks of a micro-batch on one rank."""
    engine: Engine = "zero"
    """As ``train.engine``."""
    zero_stage: int = 3
    """ZeRO stage: 0-3 for ``zero``, 0 or 1 for ``pipeline``, 3 for ``sharded_pipeline``."""
    precision: Precision = "bf16"
    """Of weights and activations."""
    stages: int = 1
    """Pipeline stages."""
    layers_per_stage: tuple[int, ...] | None = None
    """Decoder layers of each stage; None deals them as equally as possible."""
    micro_batches: int = 1
    """Micro-batches per optimizer step."""
    keep_gathered: bool = False
    """As ``train.pipeline.keep_gathered``."""
    activation_checkpointing: bool = False
    """As ``model.activation_checkpointing``."""
    loss_memory_mib: int = 256
    """As ``train.loss_memory_mib``."""
    offload_parameters: OffloadDevice = "none"
    """DeepSpeed's ``offload_param.device``; only at stage 3."""
    offload_optimizer: OffloadDevice = "none"
    """DeepSpeed's ``offload_optimizer.device``; only at stage 3."""
    reference: Reference = "stored"
    """As ``reference.mode``; ``none`` for an objective without a reference."""
    reference_precision: Precision = "bf16"
    """As ``reference.precision``."""
    reference_sharded: bool = False
    """Mode ``resident`` with ``reference.deepspeed``: each rank holds its share of the reference."""
    reference_rows: int = 8
    """As ``reference.batch_size``."""
    quantized: bool = False
    """As ``model.quantize``: frozen weights in 4 bits."""
    scores_step: bool = False
    """Whether ``selection.scope: step`` takes a scoring pass over all micro-batches first."""
    skips_masked: bool = False
    """Whether attention leaves out the positions that a mask hides, as ``flash_attention_2`` does."""
    overlap: bool | None = None
    """DeepSpeed's ``overlap_comm``; None is its default, true at stage 3 alone."""
    data_workers: int = 0
    """As ``train.data_workers``."""
    reduce_bucket: int = 500_000_000
    """DeepSpeed's ``reduce_bucket_size``, elements; its default."""
    sub_group: int = 1_000_000_000
    """DeepSpeed's ``sub_group_size``, elements; its default."""
    prefetch: int = 50_000_000
    """DeepSpeed's ``stage3_prefetch_bucket_size``, elements; its default."""
    max_reuse: int = 1_000_000_000
    """DeepSpeed's ``stage3_max_reuse_distance``, elements; its default. Parameters stay gathered from the forward
    to the backward pass where no more than this is gathered in between: the last half of this many, and in smaller
    models all."""

    def __post_init__(self) -> None:
        """Refuse a combination that no engine offers.

        Raises:
            ValueError: names the fields.
        """
        allowed = {"zero": (0, 1, 2, 3), "pipeline": (0, 1), "sharded_pipeline": (3,)}[self.engine]
        if self.zero_stage not in allowed:
            raise ValueError(f"zero_stage: {self.zero_stage} is none of {allowed}, which engine {self.engine} offers")
        if (self.stages > 1) != (self.engine != "zero") or self.ranks % self.stages:
            raise ValueError(f"stages: {self.stages} do not fit engine {self.engine} on {self.ranks} ranks")
        if self.zero_stage < 3 and (self.offload_parameters, self.offload_optimizer) != ("none", "none"):
            raise ValueError(
                f"offload_parameters, offload_optimizer: planned at ZeRO stage 3 alone, not {self.zero_stage}"
            )
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError("zero_stage: DeepSpeed cannot accumulate bf16 gradients in fp32 at stage 0")
        if self.keep_gathered and self.engine != "sharded_pipeline":
            raise ValueError("keep_gathered: has an effect with engine sharded_pipeline alone")

    @property
    def replicas(self) -> int:
        """Data-parallel ranks of a stage, D."""
        return self.ranks // self.stages

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight, w."""
        return 4 if self.precision == "fp32" else 2

    @property
    def stays_gathered(self) -> int:
        """Elements at most that ZeRO-3 keeps from the forward to the backward pass; a sharded pipeline keeps none."""
        return self.max_reuse // 2 if self.engine == "zero" else 0

    @property
    def overlaps(self) -> bool:
        """Whether communication runs beside computation; never in a pipeline."""
        return self.engine == "zero" and (self.zero_stage == 3 if self.overlap is None else self.overlap)

    def with_checkpointing(self, again: bool) -> Job:
        """Return the job with activation checkpointing or without."""
        return replace(self, activation_checkpointing=again)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank, n."""
        return self.rows * self.length


@dataclass(frozen=True)
class StageMemory:
    """What one rank of a stage holds; all ranks of a stage hold the same."""

    parameters: Bytes
    gradients: Bytes
    optimizer: Bytes
    activations: Bytes
    head: Bytes
    """Logits that the loss keeps, and the hidden states that it reads."""
    reference: Bytes
    buffers: Bytes
    """Gathered parameters, communication buckets, and what one step of the optimizer needs in passing."""

    @property
    def model_states(self) -> Bytes:
        """Parameters, gradients and optimizer: what ZeRO calls the model states."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> Bytes:
        """Everything together: a peak, as if all parts reached theirs at once."""
        return sum((getattr(self, field.name) for field in fields(self)), Bytes())


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of a job."""

    stages: tuple[StageMemory, ...]
    """By pipeline stage."""
    replicas: int
    """Ranks of each stage."""

    @property
    def largest(self) -> StageMemory:
        """The stage whose ranks need the largest device."""
        return max(self.stages, key=lambda stage: stage.total.device)

    def per_host(self, ranks_per_host: int) -> Bytes:
        """Return what the fullest host holds, when neighboring ranks share one; ranks are ordered by stage."""
        ranks = [total for stage in self.stages for total in [stage.total] * self.replicas]
        hosts = [sum(ranks[i : i + ranks_per_host], Bytes()) for i in range(0, len(ranks), ranks_per_host)]
        return Bytes(*(max(getattr(host, field.name) for host in hosts) for field in fields(Bytes)))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, e.g. for JSON."""
        return asdict(self)


def estimate_memory(shape: ModelShape, job: Job, reference: ModelShape | None = None) -> MemoryEstimate:
    """Return what each rank of a job holds at its peak.

    Args:
        shape: of the model in training, from :func:`dualtok.plan.shape.read_shape`.
        job: layout, batch and DeepSpeed settings.
        reference: of the reference model; None takes one of the model's own shape.

    Raises:
        ValueError: the layers do not fit the stages.
    """
    layers = job.layers_per_stage or split_evenly(len(shape.layers), job.stages)
    if len(layers) != job.stages or sum(layers) != len(shape.layers):
        raise ValueError(f"layers_per_stage: {layers} are not {len(shape.layers)} layers in {job.stages} stages")
    stages = []
    for stage in range(job.stages):
        held = shape.stage(layers, stage)
        adapters = shape.stage_adapters(layers, stage)
        parameters, gradients, optimizer = model_states(adapters or held, job)
        if adapters:
            parameters += _frozen(shape, job, layers, stage)
        stages.append(
            StageMemory(
                parameters,
                gradients,
                optimizer,
                _activations(shape, job, layers[stage], stage),
                _head(shape, job) if stage == job.stages - 1 else Bytes(),
                _reference(reference or shape, job),
                _buffers(held, job, adapters),
            )
        )
    return MemoryEstimate(tuple(stages), job.replicas)


def split_evenly(layers: int, stages: int) -> tuple[int, ...]:
    """Return the layers of each stage, as equal as possible, the first stages taking what is left."""
    return tuple(layers // stages + (stage < layers % stages) for stage in range(stages))


def model_states(held: tuple[int, ...], job: Job) -> tuple[Bytes, Bytes, Bytes]:
    """Return parameters, gradients and optimizer of a rank, by the table at the top of this module.

    Args:
        held: elements of each trained parameter of the rank's stage.
        job: the layout.
    """
    whole, w = sum(held), job.weight_bytes
    if job.zero_stage == 0:
        return Bytes(w * whole), Bytes(STATE * whole), Bytes(2 * STATE * whole)
    if job.zero_stage < 3:
        share = math.ceil(whole / job.replicas)
        last_pass = w * whole if job.precision == "bf16" else 0
        gradients = STATE * whole + last_pass if job.zero_stage == 1 else STATE * share
        return Bytes(w * whole), Bytes(gradients), Bytes(3 * STATE * share)
    share = sum(math.ceil(size / job.replicas) for size in held)  # each parameter is padded to a multiple of D
    kept = w * whole if job.keep_gathered else 0
    parameters = _at(job.offload_parameters, w * share) + Bytes(kept)
    if job.offload_optimizer == "none":
        return parameters, Bytes(STATE * share), Bytes(3 * STATE * share)
    gradients_host = Bytes(host=STATE * share)
    if job.offload_optimizer == "cpu":
        return parameters, gradients_host + Bytes(host=STATE * share), Bytes(host=3 * STATE * share)
    return parameters, gradients_host + Bytes(disk=STATE * share), Bytes(disk=3 * STATE * share)


def _frozen(shape: ModelShape, job: Job, layers: tuple[int, ...], stage: int) -> Bytes:
    """Weights under LoRA adapters: partitioned at stage 3, whole below; decoder layers in 4 bits if so asked."""
    held, w = shape.stage(layers, stage), job.weight_bytes
    if job.zero_stage == 3:
        return _at(job.offload_parameters, w * sum(math.ceil(size / job.replicas) for size in held))
    begin = sum(layers[:stage])
    decoder = sum(map(sum, shape.layers[begin : begin + layers[stage]]))
    return Bytes(w * sum(held) - round(decoder * (w - NF4) if job.quantized else 0))


def activation_bytes(shape: ModelShape, job: Job, layers: int) -> int:
    """Return what the backward pass of one micro-batch through some layers needs; formulas at the top.

    With activation checkpointing each layer keeps its input alone, and one layer at a time everything.
    """
    w, h, f = job.weight_bytes, shape.hidden, shape.feed_forward
    layer = job.tokens * (((8 + 8 * w) * h + 4 * w * f) if shape.gated else w * (8 * h + 2 * f))
    if not job.activation_checkpointing:
        return layers * layer
    return job.tokens * w * h * layers + (layer if layers else 0)


def _activations(shape: ModelShape, job: Job, layers: int, stage: int) -> Bytes:
    """1F1B: stage p holds the activations of min(P - p, micro-batches) micro-batches, each with the stage's input."""
    flying = min(job.stages - stage, job.micro_batches)
    inputs = flying * job.tokens * job.weight_bytes * shape.hidden if stage else 0
    mask = job.rows * job.length**2  # one byte per pair of positions of a packed block
    return Bytes(flying * activation_bytes(shape, job, layers) + inputs + mask)


def _head(shape: ModelShape, job: Job) -> Bytes:
    """The last norm and its input, and float32 logits within the budget of ``loss_memory_mib``."""
    logits = min(job.loss_memory_mib * MIB, job.tokens * shape.vocabulary * 4)
    return Bytes(logits + job.tokens * shape.hidden * (4 + 2 * job.weight_bytes))


def _reference(shape: ModelShape, job: Job) -> Bytes:
    """Weights of the reference by mode; its forward pass holds one layer at a time, which is left out."""
    bytes_each = 4 if job.reference_precision == "fp32" else 2
    largest = max((*shape.first, *shape.last, *map(sum, shape.layers)))
    share = math.ceil(shape.parameters / job.ranks)
    if job.reference == "resident":
        return Bytes(bytes_each * (largest + share if job.reference_sharded else shape.parameters))
    if job.reference == "cpu":
        logits = min(HOST_LOGITS_MIB * MIB, job.tokens * shape.vocabulary * 4)
        return Bytes(host=bytes_each * shape.parameters + logits)
    if job.reference == "offload":
        return Bytes(bytes_each * largest, bytes_each * share)
    return Bytes()


def _buffers(held: tuple[int, ...], job: Job, adapters: tuple[int, ...] = ()) -> Bytes:
    """Buckets and passing copies.

    * ZeRO 1 and 2: one bucket of gradients, and the fresh gradient of one parameter. At the step the gradient of this
      rank's share once more, in one piece; at stage 1 the others' gradients have made room for it, if there are any.
    * ZeRO 3: one bucket of gradients, gathered parameters (those that stay, those fetched ahead, and one at work), the
      whole gradient of one parameter, and at the step one sub-group's gradient.
    * An optimizer on disk: four buffers of the largest sub-group, in host memory.
    """
    whole, w, largest = sum(held), job.weight_bytes, max(held)
    trained, largest_trained = (sum(adapters), max(adapters)) if adapters else (whole, largest)
    share = math.ceil(trained / job.replicas)
    bucket = w * min(job.reduce_bucket, trained)
    if job.zero_stage == 0:
        return Bytes()
    if job.zero_stage == 1:
        return Bytes(bucket + max(w * largest_trained, STATE * (2 * share - trained)))
    if job.zero_stage == 2:
        return Bytes(bucket + w * largest_trained + STATE * share)
    ahead = job.prefetch if job.engine == "zero" else 0
    gathered = 0 if job.keep_gathered else w * min(whole, job.stays_gathered + ahead + largest)
    sub_group = min(share, job.sub_group + math.ceil(largest_trained / job.replicas))
    fixed = Bytes(bucket + gathered + w * largest_trained)
    if job.offload_optimizer == "none":
        return fixed + Bytes(STATE * sub_group)
    return fixed + Bytes(host=SWAP_BUFFERS * STATE * sub_group if job.offload_optimizer == "nvme" else 0)


def _at(device: OffloadDevice, size: int) -> Bytes:
    """Return bytes at the place to which they are offloaded."""
    return {"none": Bytes(size), "cpu": Bytes(host=size), "nvme": Bytes(disk=size)}[device]
