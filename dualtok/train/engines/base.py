"""What every engine is built from, what the training loop asks of it, and what all of them do alike.

A new engine is one file: a subclass of :class:`TrainingEngine` with the abstract methods, a function ``build`` from a
:class:`Blueprint` to it, and its name in :data:`dualtok.train.engines.build.ENGINES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dualtok.distributed.deepspeed_config import offloads_optimizer, zero_stage
from dualtok.model.loss_backends import load_backend
from dualtok.model.losses import check_batch, require_faithful
from dualtok.monitor.timing import PhaseTimer
from dualtok.objective.selection import RankGather
from dualtok.train.engines.states import states_of
from dualtok.train.optimizer import build_adamw, build_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from dualtok.config.model import ModelConfig
    from dualtok.config.train import TrainConfig
    from dualtok.distributed.deepspeed_config import Json
    from dualtok.distributed.layout import Layout
    from dualtok.model.adapters import Adapters
    from dualtok.model.losses import Batch
    from dualtok.objective.loss import Objective
    from dualtok.objective.token_weights import WeightedLoss
    from dualtok.train.engines.dp_account import PrivacyAccount
    from dualtok.train.engines.states import States
    from dualtok.train.guard import LossLimit


@dataclass(frozen=True)
class Blueprint:
    """What an engine is built from; fields as for :func:`dualtok.train.engines.build.build_engine`."""

    folder: Path | str
    model: ModelConfig
    train: TrainConfig
    config: Json
    objective: Objective
    total_steps: int
    layout: Layout
    adapters: Adapters | None
    account: PrivacyAccount | None
    seed: int

    @property
    def gather(self) -> RankGather | None:
        """What brings a selection's tokens together over the replicas; None where there is one alone."""
        replicas = self.layout.data_parallel
        return RankGather(replicas.gather, replicas.world_size) if replicas.world_size > 1 else None

    def head(self, causal_lm: PreTrainedModel | None) -> dict[str, Any]:
        """Return how the loss is computed on the head of ``causal_lm``; None is a stage without one."""
        settings: dict[str, Any] = {"memory_mib": self.train.loss_memory_mib}
        if causal_lm is not None:
            device, precision = self.layout.ranks.device, self.train.precision
            settings["kernel"] = load_backend(self.train.loss_backend, causal_lm, device, precision)
        return settings

    def adamw(self, module: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a module's parameters."""
        alone = zero_stage(self.config) == 0
        return build_adamw(module, self.train, on_host=offloads_optimizer(self.config), alone=alone)

    def schedule(self) -> Callable[[torch.optim.Optimizer], Any]:
        """Return what makes the schedule of the learning rate for an optimizer."""
        return build_schedule(self.train, self.total_steps)


class TrainedModel(Protocol):
    """What the loop tells the model that an engine trains."""

    causal_lm: Any
    """The Hugging Face model, or this rank's stage of it."""
    limit: LossLimit | None
    """Looks for spikes, if the run asks for it."""

    def scale_alpha(self, scale: float) -> None:
        """Unlearn with this share of the alpha that the objective has now."""


@dataclass
class TrainingEngine(ABC):
    """One model in training. Every rank calls every method, equally often and in the same order."""

    engine: Any
    """DeepSpeed's engine, or what counts steps and answers for the gradient as it does."""
    model: TrainedModel
    """What this rank runs, with its objective: the whole model, or its stage."""
    layout: Layout
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    """Where this rank's time goes; the loop tells it when a step begins and ends."""

    @abstractmethod
    def compare(self, batch: Batch) -> torch.Tensor:
        """Return the errors [2] of head and document boundaries in :func:`dualtok.model.losses.check_batch`'s batch."""

    @abstractmethod
    def train_step(self, micro_batches: Sequence[Batch]) -> list[WeightedLoss]:
        """Run one optimizer step over a whole accumulation window.

        Args:
            micro_batches: this replica's share of each micro-batch; the stages of one replica get the same ones.

        Returns:
            The objective's result for each micro-batch; empty on the stages that compute no loss.
        """

    @abstractmethod
    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Return the token losses [b, t] (float32) of this replica's batch without gradients, on each of its stages."""

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return this rank's parameters by their names in the whole model."""
        return dict(self.model.causal_lm.named_parameters())

    def copies(self) -> frozenset[str]:
        """Return the names of parameters of which this rank holds a copy that another one writes."""
        return frozenset()

    def to_device(self, batch: Batch) -> Batch:
        """Move a batch to this rank's device."""
        return {name: tensor.to(self.layout.ranks.device, non_blocking=True) for name, tensor in batch.items()}

    def check(self, batch: Batch, precision: str) -> None:
        """Compare dualtok's head and document boundaries with what they should be, once, before training.

        Raises:
            ConfigError: the architecture computes something else than dualtok would train on.
        """
        errors = self.compare(self.to_device(check_batch(batch)))
        require_faithful(errors, precision, type(self.model.causal_lm).__name__)

    def gradient_norm(self) -> float:
        """Return the norm of the whole model's gradient of the last optimizer step, before clipping."""
        return float(self.engine.get_global_grad_norm())

    def skipped_steps(self) -> int:
        """Return the optimizer steps that were left out because a gradient was not finite."""
        return int(self.engine.skipped_steps)

    def learning_rate(self) -> float:
        """Return the learning rate of the next optimizer step."""
        return float(self.engine.get_lr()[0])

    def zero_stage(self) -> int:
        """Return the ZeRO stage that the parameters are trained with."""
        return int(self.engine.zero_optimization_stage())

    def states(self) -> States:
        """Return what was learned, as checkpoints hold it."""
        return states_of(self.engine, self.parameters(), self.layout.data_parallel, self.copies())
