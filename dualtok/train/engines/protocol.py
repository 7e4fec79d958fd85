"""What the training loop asks of an engine; the same for every way to spread a model over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from dualtok.distributed.layout import Layout
    from dualtok.model.losses import Batch
    from dualtok.monitor.timing import PhaseTimer
    from dualtok.objective.token_weights import WeightedLoss
    from dualtok.train.engines.states import States
    from dualtok.train.guard import LossLimit


class TrainedModel(Protocol):
    """What the loop tells the model that an engine trains."""

    limit: LossLimit | None
    """Looks for spikes, if the run asks for it."""

    def scale_alpha(self, scale: float) -> None:
        """Unlearn with this share of the alpha that the objective has now."""


class TrainingEngine(Protocol):
    """One model in training. Every rank calls every method, equally often and in the same order."""

    layout: Layout

    @property
    def timer(self) -> PhaseTimer:
        """Where this rank's time goes; the loop tells it when a step begins and ends."""

    @property
    def model(self) -> TrainedModel:
        """What this rank runs, with its objective: the whole model, or its stage."""

    def check(self, batch: Batch, precision: str) -> None:
        """Compare dualtok's head and document boundaries with what they should be, once, before training.

        Raises:
            ConfigError: the architecture computes something else than dualtok would train on.
        """

    def train_step(self, micro_batches: Sequence[Batch]) -> list[WeightedLoss]:
        """Run one optimizer step over a whole accumulation window.

        Args:
            micro_batches: this replica's share of each micro-batch; the stages of one replica get the same ones.

        Returns:
            The objective's result for each micro-batch; empty on the stages that compute no loss.
        """

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Return the token losses [b, t] (float32) of this replica's batch without gradients, on each of its stages."""

    def gradient_norm(self) -> float:
        """Return the norm of the whole model's gradient of the last optimizer step, before clipping."""

    def skipped_steps(self) -> int:
        """Return the optimizer steps that were left out because a gradient was not finite."""

    def learning_rate(self) -> float:
        """Return the learning rate of the next optimizer step."""

    def zero_stage(self) -> int:
        """Return the ZeRO stage that the parameters are trained with."""

    def states(self) -> States:
        """Return what was learned, as checkpoints hold it."""
