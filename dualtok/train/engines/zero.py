"""DeepSpeed's data-parallel engine (ZeRO 0-3, offload) around a model whose forward is the training loss.

The loss is computed inside ``engine.forward``: under ZeRO-3 the weights exist only there.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dualtok.distributed.forward_only import partition_while_loading, quiet_deepspeed
from dualtok.model.load import load_causal_lm
from dualtok.model.norms import total_norm
from dualtok.monitor.timing import BACKWARD, FORWARD, OPTIMIZER, PhaseTimer
from dualtok.train.engines.base import Blueprint, TrainingEngine
from dualtok.train.engines.objective_model import ObjectiveModel
from dualtok.train.optimizer import SkippingAdamW

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dualtok.model.losses import Batch
    from dualtok.objective.token_weights import TokenWeights, WeightedLoss

# Imported where they are used, for what they take to load: DeepSpeed (2 s).


@dataclass
class ZeroEngine(TrainingEngine):
    """Data-parallel training: every rank runs the whole model on its own blocks, and holds its share of the states."""

    model: ObjectiveModel
    keep_alive: object = None
    """What transformers partitions weights by while it loads them, under ZeRO-3."""

    def __post_init__(self) -> None:
        """Ask how the optimizer steps: at ZeRO-0 in fp32 DeepSpeed clips with torch, and forgets the norm.

        ``get_global_grad_norm()`` is None then (0.19.8).
        """
        self._steps_with_torch = isinstance(self.engine.optimizer, torch.optim.Optimizer)
        self._norm = float("nan")
        if self._steps_with_torch:
            self.engine.clip_fp32_gradients = self._clip

    def _clip(self) -> None:
        """Clip by the norm that was taken before the step; DeepSpeed's own is a float32 sum on host cores."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parameters, self.engine.gradient_clipping(), torch.tensor(self._norm))

    def compare(self, batch: Batch) -> torch.Tensor:
        """Return the errors of head and document boundaries on this rank's batch."""
        with torch.no_grad():
            errors: torch.Tensor = self.engine(batch, check=True)
        return errors

    def train_step(self, micro_batches: Sequence[Batch]) -> list[WeightedLoss]:
        """Run forward and backward of each micro-batch, and the optimizer after the last."""
        self.engine.train()
        batches = [self.to_device(batch) for batch in micro_batches]
        return [
            self._micro_step(batch, weights) for batch, weights in zip(batches, self._weights(batches), strict=True)
        ]

    def _weights(self, batches: Sequence[Batch]) -> Sequence[TokenWeights | None]:
        """Return how the step's tokens count, where all of them must be known together; None where not."""
        if len(batches) == 1 or not self.model.objective.spans_step:
            return [None] * len(batches)
        self.model.scoring = True
        try:
            # With the same random numbers dropout leaves out the same units in this pass and in the one that trains.
            with same_random_numbers(self.layout.ranks.device), torch.no_grad(), self.timer.phase(FORWARD):
                token_losses = [self.engine(batch) for batch in batches]
        finally:
            self.model.scoring = False
        return self.model.objective.weigh(token_losses, batches, self.model.gather)

    def _micro_step(self, batch: Batch, weights: TokenWeights | None) -> WeightedLoss:
        self.model.weights = weights
        with self.timer.phase(FORWARD):
            loss = self.engine(batch)
        with self.timer.phase(BACKWARD):
            self.engine.backward(loss)
        with self.timer.phase(OPTIMIZER):
            if self._steps_with_torch and self.engine.is_gradient_accumulation_boundary():
                self._norm = _gradient_norm(self.model)
                if isinstance(self.engine.optimizer, SkippingAdamW):
                    self.engine.optimizer.judge(self._norm)
            self.engine.step()
        outcome, self.model.outcome = self.model.outcome, None
        assert outcome is not None
        return outcome

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Return the token losses [b, t] of this rank's batch without gradients."""
        self.engine.eval()
        losses: torch.Tensor = self.engine(self.to_device(batch))
        return losses

    def gradient_norm(self) -> float:
        """Return the norm of the global gradient of the last optimizer step, before clipping."""
        return self._norm if self._steps_with_torch else super().gradient_norm()


def build(blueprint: Blueprint) -> ZeroEngine:
    """Load a model and wrap it, its AdamW and its schedule in a DeepSpeed engine; the layout has one stage."""
    import deepspeed

    quiet_deepspeed()
    model, config = blueprint.model, blueprint.config
    keep_alive = partition_while_loading(config)
    causal_lm = load_causal_lm(
        blueprint.folder,
        attention=model.attention,
        activation_checkpointing=model.activation_checkpointing,
        quantize=model.quantize,
        trust_remote_code=model.trust_remote_code,
    )
    if blueprint.adapters is not None:
        blueprint.adapters.put_into(causal_lm)
    wrapped = ObjectiveModel(causal_lm, blueprint.objective, blueprint.gather, **blueprint.head(causal_lm))
    engine, _, _, _ = deepspeed.initialize(
        model=wrapped, optimizer=blueprint.adamw(wrapped), lr_scheduler=blueprint.schedule(), config=config
    )
    timer = PhaseTimer(blueprint.layout.ranks.device)
    return ZeroEngine(engine, wrapped, blueprint.layout, timer, keep_alive)


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave the random numbers of the host and of an accelerator as they were found."""
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    host, there = torch.get_rng_state(), None if accelerator is None else accelerator.get_rng_state(device)
    try:
        yield
    finally:
        torch.set_rng_state(host)
        if accelerator is not None:
            accelerator.set_rng_state(there, device)


def _gradient_norm(model: torch.nn.Module) -> float:
    """Return the norm of the gradients, which are reduced over the ranks by now; 0 when no parameter has one."""
    return float(total_norm(parameter.grad for parameter in model.parameters() if parameter.grad is not None))
