"""ZeRO-3 inside DeepSpeed's PipelineEngine: each stage's parameters, gradients and optimizer states are sharded over
the data-parallel ranks of that stage.

DeepSpeed refuses this combination. What stands in the way, and what is done about it here, by subclasses alone:

1. PipelineEngine asserts a ZeRO stage below 2 once, after the base engine is built. :class:`ShardedStageEngine` answers
   that one question with 1; everything before and after sees 3.
2. The coordinator of gathered parameters records the order of modules, checks over *all* ranks that it is the same, and
   fetches ahead by it. Stages run different modules at different times, so that the check would wait for ever, and the
   order of 1F1B does not repeat. :class:`UntracedCoordinator` records nothing and fetches each module when it runs.
3. PipelineEngine reduces gradients once, at the end. ZeRO-3 must do it after each micro-batch's backward pass, and must
   be told before each that it is another micro-batch: in the cool-down two backward passes follow each other.
4. For the same reason modules must be told before each backward pass how many of their inputs' gradients to wait for.
   DeepSpeed counts them in the forward pass alone; a second backward pass would keep the whole stage gathered.
5. ZeRO-3's part of the gradient of a weight that two stages share is summed over them on its own.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from deepspeed.utils import safe_get_local_grad, safe_set_local_grad
from torch import nn

from dualtok.train.engines.pipeline import StageEngine, build_stages, timed_instructions

if TYPE_CHECKING:
    from collections.abc import Callable

    from dualtok.distributed.deepspeed_config import Json
    from dualtok.distributed.layout import Layout
    from dualtok.train.engines.base import Blueprint
    from dualtok.train.engines.pipeline import PipelinedEngine


KEPT = -1
"""Stands in for a module that uses a parameter; real ones count from 0."""


class UntracedCoordinator(PartitionedParameterCoordinator):
    """Gathers a module's parameters when it runs and releases them after; keeps no trace, hence never fetches ahead.

    Parameters below DeepSpeed's persistence threshold stay gathered until the optimizer's step.
    """

    def release_sub_module(self, submodule: nn.Module, forward: bool = False) -> None:
        """Release a module's parameters, but for those that stay: without a trace DeepSpeed releases these too."""
        kept = [parameter for parameter in iter_params(submodule) if parameter.ds_persist]
        for parameter in kept:
            parameter.ds_active_sub_modules.add(KEPT)
        super().release_sub_module(submodule, forward=forward)
        for parameter in kept:
            parameter.ds_active_sub_modules.discard(KEPT)

    def reset_step(self) -> None:
        """Forget the running step instead of turning what was seen of it into a trace."""
        self._clean_inflight_param_registry()
        self._clear_trace_structures()


class _BaseIsBuilt(DeepSpeedEngine):
    """Stands between PipelineEngine and its base to see when the base engine is complete."""

    _asked_by_pipeline = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._asked_by_pipeline = True


class ShardedStageEngine(StageEngine, _BaseIsBuilt):
    """A pipeline stage under ZeRO-3."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer.parameter_offload.param_coordinator.__class__ = UntracedCoordinator
        # Which ranks hold copies of a parameter: none but those marked so (StagesModule.tie). DeepSpeed asks the rank
        # among tensor-parallel ones here and would count a shared weight on both of its stages.
        self.optimizer.model_parallel_rank = self.stage_id
        # The epilogue of each backward pass reduces this micro-batch's gradients into the shards.
        self.enable_backward_allreduce = True

    def zero_optimization_stage(self) -> int:
        """Return 3, but for the one question of PipelineEngine's assert."""
        if self._asked_by_pipeline:
            self._asked_by_pipeline = False
            return int(ZeroStageEnum.optimizer_states)
        return int(super().zero_optimization_stage())

    def _exec_forward_pass(self, buffer_id: int) -> None:
        super()._exec_forward_pass(buffer_id)
        self._awaited = [
            (module, count) for module in self.module.modules() if (count := getattr(module, "ds_grads_remaining", 0))
        ]

    def _exec_backward_pass(self, buffer_id: int) -> None:
        self._backwarded += 1
        for module, count in self._awaited:
            module.ds_grads_remaining = count
        self.optimizer.clear_backward_seen_flag()
        with self._at_boundary(self._backwarded == self.micro_batches):
            super()._exec_backward_pass(buffer_id)
            if not self.is_last_stage():  # the last stage's loss goes through DeepSpeedEngine.backward, which does it
                self._backward_epilogue()

    @contextmanager
    def _at_boundary(self, boundary: bool) -> Any:
        """Let ZeRO-3 know the last micro-batch, whose gradients are then moved to where the optimizer works."""
        self._force_grad_boundary = boundary
        try:
            yield
        finally:
            self._force_grad_boundary = False

    def _exec_reduce_tied_grads(self) -> None:
        for weight, group in self.module.get_tied_weights_and_groups():
            gradient = safe_get_local_grad(weight).clone()
            dist.all_reduce(gradient, group=group)
            safe_set_local_grad(weight, gradient)

    def _exec_reduce_grads(self) -> None:
        """Do nothing: every backward pass has reduced its own."""

    _INSTRUCTION_MAP: ClassVar = {
        **StageEngine._INSTRUCTION_MAP,
        **timed_instructions(
            {
                schedule.ForwardPass: _exec_forward_pass,
                schedule.BackwardPass: _exec_backward_pass,
                schedule.ReduceTiedGrads: _exec_reduce_tied_grads,
                schedule.ReduceGrads: _exec_reduce_grads,
            }
        ),
    }


def build(blueprint: Blueprint) -> PipelinedEngine:
    """Build this rank's stage of a model, sharded over the stage's ranks while it is read."""
    return build_stages(blueprint, ShardedStageEngine, _partitioner(blueprint.config, blueprint.layout))


def _partitioner(config: Json, layout: Layout) -> Callable[[list[nn.Parameter]], None]:
    """Return a function that shards parameters over this stage's ranks, as soon as they are read."""
    own = {name: config[name] for name in ("zero_optimization", "bf16")} | {"train_micro_batch_size_per_gpu": 1}
    group = layout.data_parallel.group

    def partition(parameters: list[nn.Parameter]) -> None:
        deepspeed.zero.Init(module=nn.ParameterList(parameters), data_parallel_group=group, config_dict_or_path=own)

    return partition
