"""Stands in for DeepSpeed's engines where a test is about what dualtok asks of them; real ones run in multi_rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

    from dualtok.model.losses import Batch


class FakeEngine:
    """What :class:`~dualtok.train.engines.zero.ZeroEngine` uses of ``DeepSpeedEngine``; writes down what it is asked.

    Like DeepSpeed at ZeRO-0 it steps at the end of a window, clips first, and divides each loss by the window's length.
    """

    def __init__(self, model: nn.Module, optimizer: Any, window: int = 1, clip: float = 0.0) -> None:
        self.model, self.optimizer, self.window, self.clip = model, optimizer, window, clip
        self.basic_optimizer = optimizer
        self.calls: list[str] = []
        self.skipped_steps = 0
        self._micro_batches = 0

    def __call__(self, batch: Batch, **named: Any) -> Any:
        self.calls.append("forward")
        return self.model(batch, **named)

    def train(self) -> None:
        self.model.train()

    def eval(self) -> None:
        self.model.eval()

    def backward(self, loss: torch.Tensor) -> None:
        self.calls.append("backward")
        self._micro_batches += 1
        (loss / self.window).backward()

    def is_gradient_accumulation_boundary(self) -> bool:
        return self._micro_batches % self.window == 0

    def gradient_clipping(self) -> float:
        return self.clip

    def step(self) -> None:
        self.calls.append("step")
        if self.is_gradient_accumulation_boundary() and self.optimizer is not None:
            if self.clip:
                self.clip_fp32_gradients()
            self.optimizer.step()
            self.skipped_steps += getattr(self.optimizer, "overflow", False)
            self.optimizer.zero_grad()

    def clip_fp32_gradients(self) -> None:
        raise AssertionError("dualtok clips by itself")

    def get_global_grad_norm(self) -> torch.Tensor:
        return torch.tensor(2.5)

    def get_lr(self) -> list[float]:
        return [0.25, 0.5]

    def zero_optimization_stage(self) -> int:
        return 2


class FakeStage:
    """What :class:`~dualtok.train.engines.pipeline.PipelinedEngine` uses of its ``StageEngine``.

    ``eval_batch`` answers with what :attr:`result` says, as the last stage does.
    """

    def __init__(self, module: Any = None, result: torch.Tensor | None = None) -> None:
        self.module, self.result = module, result
        self.windows: list[list[Batch]] = []
        self.outcomes: list[Any] = []
        self.skipped_steps = 3
        self.optimizer = self.basic_optimizer = torch.optim.SGD([torch.zeros(1)])

    def begin(self, window: list[Batch]) -> list[Batch]:
        self.windows.append(window)
        return window

    def train_batch(self, window: list[Batch]) -> None:
        self.outcomes = [len(self.windows)] * len(window)

    def eval_batch(self, window: list[Batch], **named: Any) -> list[torch.Tensor | None]:
        assert named["num_micro_batches"] == len(window) == 1
        return [self.result]

    def get_global_grad_norm(self) -> torch.Tensor:
        return torch.tensor(4.0)

    def get_lr(self) -> list[float]:
        return [0.125]

    def zero_optimization_stage(self) -> int:
        return 1
