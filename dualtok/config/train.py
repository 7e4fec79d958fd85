"""Settings of the training loop."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from dualtok.config.data import SplitName
from dualtok.config.folds import LeaveOut

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

KERNEL_PRECISIONS = {"cut_cross_entropy": ("bf16",)}
"""Of ``train.loss_backend`` -> values of ``train.precision`` that it takes; those that are not listed take all."""


@dataclass(config=ConfigDict(extra="forbid"))
class PipelineConfig:
    """How a model is cut into pipeline stages."""

    stages: Count
    """Pipeline stages; they must divide the ranks, and there cannot be more of them than decoder layers. Unit:
    stages."""

    balance: Literal["cost", "layers"] | tuple[Count, ...] = "cost"
    """How decoder layers are dealt to stages: by counted cost, embeddings and head included (``cost``), as equally as
    possible (``layers``), or as listed, e.g. ``[6, 6, 6, 4]``. Unit: decoder layers."""

    keep_gathered: bool = False
    """Only ``sharded_pipeline``: keep a stage's parameters gathered from one optimizer step to the next, instead of
    gathering them for every micro-batch and direction. Saves communication, costs the memory of a whole stage's
    parameters; gradients and optimizer states stay sharded."""

    allow_untested_deepspeed: bool = False
    """Only ``sharded_pipeline``: try a DeepSpeed version that this engine was never tested with."""

    def __post_init__(self) -> None:
        """Refuse a pipeline of one stage and a list of another length."""
        if self.stages < 2:
            raise ValueError("train.pipeline.stages: a pipeline has at least 2 stages; use train.engine=zero for one")
        if isinstance(self.balance, tuple) and len(self.balance) != self.stages:
            raise ValueError(
                f"train.pipeline.balance: lists {len(self.balance)} stages, but train.pipeline.stages is {self.stages}"
            )


GuardAction = Literal["stop", "skip", "lower_alpha", "roll_back"]


@dataclass(config=ConfigDict(extra="forbid"))
class GuardConfig:
    """What all ranks do together about a step whose loss is not finite, or far above those before it.

    The weights are left as they were in every case. ``stop`` ends the run, ``skip`` goes on with the next blocks,
    ``lower_alpha`` does so with a smaller ``selection.alpha`` from then on, ``roll_back`` first goes back to the last
    checkpoint (the blocks since then are not read again).
    """

    on_nan: GuardAction = "stop"
    """For a loss or gradient that is not finite."""

    on_spike: GuardAction = "stop"
    """For a spike; only with ``spike_factor``."""

    spike_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """A step is a spike when its mean token loss is above this many times the median of the last good steps; without it
    none is looked for. Unit: none."""

    window: Count = 32
    """Good steps that the median is taken of; no step is a spike before there are so many. Unit: optimizer steps."""

    alpha_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What ``lower_alpha`` multiplies alpha by, each time. Unit: none."""

    patience: Count = 3
    """Bad steps in a row, or roll-backs in all, after which the run ends whatever is configured. Unit: steps or
    roll-backs."""

    def __post_init__(self) -> None:
        """Refuse settings without effect."""
        if self.spike_factor is None and (self.on_spike != "stop" or self.window != 32):
            raise ValueError("train.guard.on_spike and window: have no effect without train.guard.spike_factor")
        if self.alpha_factor != 0.5 and "lower_alpha" not in (self.on_nan, self.on_spike):
            raise ValueError("train.guard.alpha_factor: has no effect without an action 'lower_alpha'")


@dataclass(config=ConfigDict(extra="forbid"))
class TrainConfig:
    """Optimisation, batch, precision, evaluation and checkpoints. All sizes are global: none depends on the ranks."""

    learning_rate: Positive
    """Peak learning rate of AdamW. Unit: none."""

    batch_size: Count
    """Blocks per optimizer step over all ranks and accumulation steps. Unit: blocks."""

    steps: Count | None = None
    """Optimizer steps; give either this or ``epochs``. Unit: optimizer steps."""

    epochs: Positive | None = None
    """Passes over the split; give either this or ``steps``. Unit: passes."""

    split: SplitName = "train"
    """Split to learn: ``reference`` and ``attack_reference`` for the models of those names."""

    leave_out: LeaveOut | None = None
    """Fold of documents that are not learned, for a reference model that is to judge them without having seen them
    (``reference.folds``), e.g. ``{fold: 0, folds: 2}``. Without effect, and refused, with ``engine: opacus``, as are
    ``deepspeed``, ``data_workers``, ``loss_backend``, ``loss_memory_mib``, ``gradient_clipping`` and
    ``guard.spike_factor``."""

    gradient_accumulation: Count = 1
    """Micro-batches per optimizer step. ``selection.scope`` says whether tokens are ranked per micro-batch or per step.
    Unit: micro-batches."""

    engine: Literal["zero", "pipeline", "sharded_pipeline", "opacus"] = "zero"
    """How the model is spread over ranks: data-parallel with ZeRO 0-3 (``zero``), in pipeline stages with ZeRO 0-1
    (``pipeline``), or in pipeline stages that are each sharded by ZeRO-3 (``sharded_pipeline``). ``opacus`` trains with
    DP-SGD, as a baseline: the model is whole on every rank, and ``batch_size`` counts documents."""

    pipeline: PipelineConfig | None = None
    """Number and balance of the stages; for the two pipeline engines."""

    deepspeed: str | None = None
    """DeepSpeed JSON file such as ``ds_configs/zero3.json``; without it ZeRO stage 0 in fp32 and 1 in
    bf16 (at stage 0 DeepSpeed would accumulate bf16 gradients in bf16, which dualtok refuses)."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights and activations. Under bf16 master weights and accumulated gradients stay in fp32."""

    gradient_clipping: NotNegative = 1.0
    """Largest norm of the global gradient; 0 turns clipping off. Default: GPT-3 (Brown et al. 2020). Unit: none."""

    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up: it stays (``constant``), or falls to 0 at the last step."""

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear warm-up. Unit: optimizer steps."""

    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of the matrices; biases and norms have none. Default: GPT-3 (Brown et al. 2020). Unit:
    none."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's coefficients of the running means of the gradient and of its square. Default: GPT-3 (Brown et al. 2020).
    Unit: none."""

    epsilon: Positive = 1e-8
    """Added to the denominator of AdamW's update, against division by 0. Default: torch's own. Unit: none."""

    loss_backend: Literal["torch", "cut_cross_entropy", "liger"] = "torch"
    """What computes the token losses from the last hidden states. ``torch`` runs everywhere and its backward pass
    visits selected tokens only; the others are GPU kernels of packages to be installed, whose weighted gradients are
    checked when the run starts. ``cut_cross_entropy`` wants ``precision: bf16``."""

    loss_memory_mib: Count | None = None
    """Memory per rank for logits in MiB, with ``loss_backend: torch``: as many as fit are kept for the backward pass,
    those of other selected tokens are computed again. Without it 256 on a CPU and 1024 on an accelerator."""

    data_workers: Annotated[int, Field(ge=0)] = 0
    """Processes per rank that read blocks ahead; 0 reads in the training process. Unit: processes."""

    evaluate_every: Count | None = None
    """Optimizer steps between evaluations on ``validation``; without it only at the end. Unit: optimizer steps."""

    evaluation_blocks: Count = 256
    """Most blocks of ``validation``, and of the training split, that an evaluation reads. Unit: blocks."""

    checkpoint_every: Count | None = None
    """Optimizer steps between checkpoints; without it one per evaluation, or every 500 steps if there is none on the
    way. Unit: optimizer steps."""

    checkpoint_keep: Count = 1
    """How many of the last checkpoints stay on disk; the best one always does. Unit: checkpoints."""

    checkpoint_in_background: bool = False
    """Write checkpoints while training goes on; costs each rank the host memory of a copy of its states (12 bytes per
    parameter that it holds)."""

    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    """What to do when training diverges."""

    def __post_init__(self) -> None:
        """Refuse contradictions inside the section."""
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("train: give exactly one of 'steps' and 'epochs'")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(
                f"train.warmup_steps: {self.warmup_steps} of {self.steps} steps: the learning rate is never reached"
            )
        self._check_engine()
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"train.batch_size: {self.batch_size} blocks cannot be cut into {self.gradient_accumulation} "
                "micro-batches (train.gradient_accumulation)"
            )
        if self.loss_memory_mib is not None and self.loss_backend != "torch":
            raise ValueError(
                f"train.loss_memory_mib: has no effect with loss_backend: {self.loss_backend}, which keeps no logits; "
                "leave it out"
            )
        if self.precision not in KERNEL_PRECISIONS.get(self.loss_backend, (self.precision,)):
            raise ValueError(
                f"train.loss_backend: {self.loss_backend} computes no gradients in {self.precision}; set precision: "
                f"{' or '.join(KERNEL_PRECISIONS[self.loss_backend])}, or loss_backend: torch"
            )
        if self.split in ("validation", "held_out"):
            raise ValueError(f"train.split: {self.split!r} is kept for evaluation and must not be trained on")

    @property
    def stages(self) -> int:
        """Pipeline stages; 1 without a pipeline."""
        return 1 if self.pipeline is None else self.pipeline.stages

    def _check_private(self) -> None:
        without = {
            "deepspeed": self.deepspeed is not None,
            "leave_out": self.leave_out is not None,
            "data_workers": self.data_workers > 0,
            "loss_backend": self.loss_backend != "torch",
            "loss_memory_mib": self.loss_memory_mib is not None,
            "gradient_clipping": self.gradient_clipping != 1.0,
            "guard.spike_factor": self.guard.spike_factor is not None,
        }
        for name, given in without.items():
            if given:
                raise ValueError(
                    f"train.{name}: has no effect with train.engine=opacus, which clips each document's gradient "
                    "(privacy.max_gradient_norm) on a whole copy of the model; remove it"
                )
        if self.precision != "fp32":
            raise ValueError("train.precision: train.engine=opacus computes in fp32; set precision: fp32")

    def _check_engine(self) -> None:
        if self.engine == "opacus":
            self._check_private()
        if (self.pipeline is None) != (self.engine in ("zero", "opacus")):
            raise ValueError(
                f"train.pipeline: has no effect with train.engine={self.engine}; remove it"
                if self.pipeline is not None
                else f"train.pipeline: missing; train.engine={self.engine} needs the number of stages, "
                "e.g. pipeline: {stages: 2}"
            )
        if self.pipeline is not None and self.engine == "pipeline":
            for name in ("keep_gathered", "allow_untested_deepspeed"):
                if getattr(self.pipeline, name):
                    raise ValueError(f"train.pipeline.{name}: has an effect with train.engine=sharded_pipeline alone")
