"""DeepSpeed's PipelineEngine around the stages of a Hugging Face model, with ZeRO 0-1.

Each rank builds its own stage and reads its own weights. All stages of a replica hold the same micro-batches, so that
positions, labels and reference losses need not travel; only hidden states and their gradients do.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import wraps
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from torch import nn

from dualtok.distributed.forward_only import quiet_deepspeed
from dualtok.model.empty import tied_weights
from dualtok.model.load import DTYPES, read_model_config
from dualtok.model.norms import total_norm
from dualtok.model.stages import build_stage, stage_names
from dualtok.monitor.timing import BACKWARD, FORWARD, OPTIMIZER, PIPELINE, PhaseTimer
from dualtok.train.engines.base import Blueprint, TrainingEngine
from dualtok.train.engines.objective_model import ObjectiveModel
from dualtok.train.optimizer import SkippingAdamW

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel

    from dualtok.distributed.layout import Layout
    from dualtok.model.losses import Batch
    from dualtok.model.stage_bounds import StageBounds
    from dualtok.model.stages import StageNames
    from dualtok.objective.loss import Objective
    from dualtok.objective.selection import Gather
    from dualtok.objective.token_weights import WeightedLoss


class StageModel(ObjectiveModel):
    """One stage: token ids in on the first, hidden states in between, the objective's loss out on the last.

    ``batch`` is the micro-batch whose ids or hidden states come in; the engine sets it before each forward pass.
    """

    def __init__(
        self, causal_lm: PreTrainedModel, bounds: StageBounds, objective: Objective, gather: Gather | None, **head: Any
    ) -> None:
        super().__init__(causal_lm, objective, gather, **head)
        self.bounds = bounds
        self.batch: Batch = {}
        self.checking = False
        self._inputs = torch.zeros(0)

    def forward(self, inputs: torch.Tensor) -> Any:  # type: ignore[override]  # called by PipelineModule
        """Return hidden states [b, t, d], or on the last stage what :class:`ObjectiveModel` does."""
        self._inputs = inputs
        if self.bounds.is_last:
            return super().forward(self.batch, check=self.checking)
        return self.hidden_states(self.batch)

    def base_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return what the base model of this stage takes."""
        ids_or_hidden = {"input_ids" if self.bounds.is_first else "inputs_embeds": self._inputs}
        return {**ids_or_hidden, "position_ids": batch["position_ids"]}


class StagesModule(PipelineModule):
    """The PipelineModule of DeepSpeed that holds one :class:`StageModel` per rank."""

    def __init__(self, stage: StageModel, layout: Layout) -> None:
        others = [nn.Identity() for _ in range(layout.stages)]
        layers = [*others[: layout.stage], stage, *others[layout.stage + 1 :]]
        with redirect_stdout(StringIO()):  # it prints its partitioning
            super().__init__(layers, num_stages=layout.stages, partition_method="uniform")
        self._tied: list[tuple[nn.Parameter, Any]] = []
        """The weight shared with another stage, if there is one here, and the ranks that share it; in a list, as a
        parameter of the module it would be saved a second time."""
        # What DeepSpeed's norms go by: a weight is counted on its own rank, unless another one counts its copy.
        for parameter in self.parameters():
            mark(parameter, counted=True)

    @property
    def stage(self) -> StageModel:
        """The one layer that this rank holds."""
        stage: StageModel = self.forward_funcs[0]
        return stage

    def tie(self, weight: nn.Parameter | None, layout: Layout) -> None:
        """Keep the embeddings of the first stage and the head of the last one the same weight.

        Both start equal and get the sum of both gradients, hence equal updates.

        Args:
            weight: this stage's copy, None on inner stages.
            layout: its first and last stages share.
        """
        last = (layout.stages - 1) * layout.data_parallel.world_size
        for replica in range(layout.data_parallel.world_size):
            group = dist.new_group([replica, last + replica])
            if weight is not None and replica == layout.data_parallel.rank:
                self._tied = [(weight, group)]
        if weight is not None and layout.is_last_stage:
            mark(weight, counted=False)

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """Return the shared weight and the ranks that share it, as the engine sums their gradients."""
        return self._tied


def mark(parameter: nn.Parameter, *, counted: bool) -> None:
    """Say whether a parameter counts in the gradient's norm, in each of the ways that DeepSpeed's optimizers ask.

    DeepSpeed 0.19.8 counts the parameters of a later stage only if they are marked as model-parallel, at every ZeRO
    stage: without the mark gradients would be clipped by the norm of the first stage alone.
    """
    vars(parameter).update(model_parallel=counted, ds_pipe_replicated=not counted)


PHASE_OF = {
    schedule.ForwardPass: FORWARD,
    schedule.BackwardPass: BACKWARD,
    schedule.OptimizerStep: OPTIMIZER,
    **dict.fromkeys((schedule.SendActivation, schedule.RecvActivation, schedule.SendGrad, schedule.RecvGrad), PIPELINE),
}
"""What a stage's instructions count as; gradients are reduced by collectives, which count by themselves."""


def timed_instructions(instructions: dict[Any, Callable[..., None]]) -> dict[Any, Callable[..., None]]:
    """Return a stage's instructions, each of which counts its time as a phase."""

    def timed(execute: Callable[..., None], phase: str) -> Callable[..., None]:
        @wraps(execute)
        def run(engine: StageEngine, *arguments: Any, **named: Any) -> None:
            with engine.timer.phase(phase):
                execute(engine, *arguments, **named)

        return run

    return {
        instruction: timed(execute, PHASE_OF[instruction]) if instruction in PHASE_OF else execute
        for instruction, execute in instructions.items()
    }


class StageEngine(PipelineEngine):
    """PipelineEngine that hands each stage its whole micro-batch and clips by the norm of the whole model."""

    window: Sequence[Batch] = ()
    """The micro-batches of the running schedule."""
    timer: PhaseTimer = PhaseTimer()
    """Replaced by the stage's own when the engine is built."""

    def begin(self, window: Sequence[Batch]) -> Any:
        """Take up a window of micro-batches; returns the iterator that DeepSpeed draws from."""
        shape = tuple(window[0]["input_ids"].shape)
        if shape != getattr(self, "_shape", shape):
            self.reset_activation_shape()  # the sizes of hidden states are sent once, and then relied on
        self._shape = shape
        self.window, self._forwarded, self._backwarded = window, 0, 0
        self.outcomes: list[WeightedLoss] = []
        self.total_loss = None  # DeepSpeed adds up evaluation results of any shape here
        # Labels are read from the window; DeepSpeed only wants to see something it can move.
        return iter([(batch["input_ids"], batch["labels"]) for batch in window])

    def _exec_forward_pass(self, buffer_id: int) -> None:
        stage: StageModel = self.module.stage
        stage.batch = self.window[self._forwarded]
        self._forwarded += 1
        super()._exec_forward_pass(buffer_id)
        if stage.outcome is not None:
            self.outcomes.append(stage.outcome)
            stage.outcome = None

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        if not self.zero_optimization():
            self._global_grad_norm = self._norm_of_whole_gradient()
            if isinstance(self.optimizer, SkippingAdamW):
                self.optimizer.judge(float(self._global_grad_norm))
        super()._exec_optimizer_step(lr_kwargs)

    def _norm_of_whole_gradient(self) -> torch.Tensor:
        """Return the norm over all stages, a shared weight counted once.

        At ZeRO-0 DeepSpeed forgets it, and would leave out the ranks that it takes for copies.
        """
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None and p.model_parallel]
        square = total_norm(gradients).to(self.device).square()
        dist.all_reduce(square, group=self.grid.get_pipe_parallel_group())
        return square.sqrt()

    def clip_fp32_gradients(self) -> None:
        """Clip by :meth:`_norm_of_whole_gradient`; DeepSpeed asks for it at ZeRO-0 alone."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        nn.utils.clip_grads_with_norm_(parameters, self.gradient_clipping(), self._global_grad_norm)

    _INSTRUCTION_MAP: ClassVar = timed_instructions(
        {
            **PipelineEngine._INSTRUCTION_MAP,
            schedule.ForwardPass: _exec_forward_pass,
            schedule.OptimizerStep: _exec_optimizer_step,
        }
    )


@dataclass
class PipelinedEngine(TrainingEngine):
    """The training loop's view of a pipeline."""

    model: StageModel
    names: StageNames = field(kw_only=True)
    """Names of this stage's parameters, here and in the whole model."""

    def compare(self, batch: Batch) -> torch.Tensor:
        """Return the errors of head and document boundaries, on every stage."""
        self.model.checking = True
        errors = self._evaluate(batch, torch.Size([2]))
        self.model.checking = False
        return errors

    def train_step(self, micro_batches: Sequence[Batch]) -> list[WeightedLoss]:
        """Run one 1F1B schedule and the optimizer."""
        self.engine.train_batch(self.engine.begin([self.to_device(batch) for batch in micro_batches]))
        return self.engine.outcomes

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Return the token losses [b, t] of this replica's batch on each of its stages."""
        return self._evaluate(batch, batch["labels"].shape)

    @torch.no_grad()
    def _evaluate(self, batch: Batch, shape: torch.Size) -> torch.Tensor:
        """Run one micro-batch forward; return the last stage's result, of ``shape``, on every stage."""
        found = self.engine.eval_batch(
            self.engine.begin([self.to_device(batch)]),
            compute_loss=False,
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=1,
        )
        result = found[0] if self.layout.is_last_stage else torch.empty(shape, device=self.layout.ranks.device)
        dist.broadcast(result, group=self.layout.replica.group, group_src=self.layout.stages - 1)
        return result

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return this stage's parameters by their names in the whole model."""
        causal_lm = self.model.causal_lm
        tied = tied_weights(causal_lm)
        names = {self.names.whole(name, self.layout.stage): p for name, p in causal_lm.named_parameters()}
        return {tied.get(name, name): parameter for name, parameter in names.items()}

    def copies(self) -> frozenset[str]:
        """Return the shared embeddings on any stage but the first, which writes them."""
        if self.layout.is_first_stage:
            return frozenset()
        shared = {id(weight) for weight, _ in self.engine.module.get_tied_weights_and_groups()}
        return frozenset(name for name, parameter in self.parameters().items() if id(parameter) in shared)


def build(blueprint: Blueprint) -> PipelinedEngine:
    """Build this rank's stage of a model and wrap it, its AdamW and its schedule in a pipeline engine."""
    return build_stages(blueprint, StageEngine)


def build_stages(
    blueprint: Blueprint, engine_class: type[StageEngine], settle: Callable[[list[nn.Parameter]], None] | None = None
) -> PipelinedEngine:
    """Build a pipeline of ``engine_class``; ``settle`` is called with parameters as soon as they are read.

    The objective is called on the last stage with this replica's token losses.

    Raises:
        ConfigError: the model cannot be cut into these stages.
    """
    quiet_deepspeed()
    layout, config, adapters = blueprint.layout, blueprint.config, blueprint.adapters
    causal_lm, bounds = layout.ranks.together(lambda: _read_stage(blueprint, settle))
    names = stage_names(causal_lm, bounds)
    if adapters is not None:
        adapters.put_into(causal_lm, lambda name: names.whole(name, layout.stage))
        if settle is not None:
            settle([parameter for parameter in causal_lm.parameters() if not hasattr(parameter, "ds_id")])
    head = blueprint.head(causal_lm if layout.is_last_stage else None)
    stage = StageModel(causal_lm, bounds[layout.stage], blueprint.objective, blueprint.gather, **head)
    module = StagesModule(stage, layout)
    if tied_weights(causal_lm) and adapters is None:  # frozen copies stay equal by themselves
        module.tie(_shared_weight(causal_lm, layout), layout)
    with redirect_stdout(StringIO()):  # it prints the sizes of the stages
        engine = engine_class(
            args=None,
            model=module,
            optimizer=blueprint.adamw(module),
            lr_scheduler=blueprint.schedule(),
            mpu=module.mpu(),
            config=config,
            config_class=DeepSpeedConfig(config, module.mpu()),
        )
    engine.timer = PhaseTimer(layout.ranks.device)
    return PipelinedEngine(engine, stage, layout, engine.timer, names=names)


def _read_stage(
    blueprint: Blueprint, settle: Callable[[list[nn.Parameter]], None] | None
) -> tuple[PreTrainedModel, list[StageBounds]]:
    pipeline, layout = blueprint.train.pipeline, blueprint.layout
    assert pipeline is not None
    return build_stage(
        blueprint.folder,
        read_model_config(blueprint.folder),
        blueprint.model,
        pipeline.balance,
        stage=layout.stage,
        stages=layout.stages,
        dtype=DTYPES[blueprint.train.precision],
        device=layout.ranks.device,
        settle=settle,
    )


def _shared_weight(causal_lm: PreTrainedModel, layout: Layout) -> nn.Parameter | None:
    """Return this stage's copy of the weight that embeddings and head share; None on inner stages."""
    if layout.is_first_stage or layout.is_last_stage:
        holder: Any = causal_lm.get_input_embeddings() if layout.is_first_stage else causal_lm.get_output_embeddings()
        weight: nn.Parameter = holder.weight
        return weight
    return None
