"""AdamW and its learning-rate schedule, the same for every engine."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from dualtok.config.train import TrainConfig

# Imported where they are used, for what they take to load: DeepSpeed (2 s), transformers (1 to 4 s).


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that leaves out a step whose gradient is not finite.

    DeepSpeed's own optimizers do so by themselves; at ZeRO-0 in fp32 it steps with this one, asks for ``overflow``
    afterwards, counts the step as skipped and holds the schedule.
    """

    overflow = False

    def judge(self, norm: float) -> None:
        """Decide about the next step by the norm of the whole gradient."""
        self.overflow = not math.isfinite(norm)

    def step(self, closure: Any = None) -> Any:
        """Change the parameters, unless the gradient is not finite."""
        return None if self.overflow else super().step(closure)


def build_adamw(
    model: torch.nn.Module, train: TrainConfig, *, on_host: bool, alone: bool = False
) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices only; peft's scales, which start at 1, are shaped like some.

    Args:
        model: its parameters may be partitioned by ZeRO-3.
        train: learning rate, betas, epsilon and decay.
        on_host: take DeepSpeed's CPU Adam, for states that live in host memory.
        alone: no optimizer of DeepSpeed's will stand before it (ZeRO-0 in fp32).
    """

    def dimensions(parameter: torch.nn.Parameter) -> int:
        return len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty 1-D tensor behind

    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [dimensions(parameter) >= 2 and ".ia3_l." not in name for name, parameter in parameters]
    groups = [
        {"params": [p for (_, p), yes in zip(parameters, decayed, strict=True) if yes is chosen], "weight_decay": decay}
        for chosen, decay in ((True, train.weight_decay), (False, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {"lr": train.learning_rate, "betas": train.betas, "eps": train.epsilon}
    if on_host:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        host_optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        return host_optimizer
    # One pass over each parameter and its states; torch's default off the GPU is a loop of elementwise operations.
    return (SkippingAdamW if alone else torch.optim.AdamW)(groups, fused=True, **settings)


def build_schedule(train: TrainConfig, total_steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    """Return a function from the optimizer to its learning-rate schedule, as ``deepspeed.initialize`` takes it."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if train.schedule == "constant" else train.schedule

    def build(optimizer: torch.optim.Optimizer) -> Any:
        return get_scheduler(name, optimizer, num_warmup_steps=train.warmup_steps, num_training_steps=total_steps)

    return build
