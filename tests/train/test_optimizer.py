"""The learning rate of every step in closed form, and what decays."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch

from dualtok.config.train import TrainConfig
from dualtok.train.optimizer import build_adamw, build_schedule

STEPS, WARM_UP, RATE = 10, 4, 0.5


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"learning_rate": RATE, "batch_size": 1, "steps": STEPS, "warmup_steps": WARM_UP, **changes})


def rates(train: TrainConfig) -> list[float]:
    """Return the learning rate of each step."""
    optimizer = build_adamw(torch.nn.Linear(2, 2), train, on_host=False)
    schedule = build_schedule(train, STEPS)(optimizer)
    found = []
    for _ in range(STEPS):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_of_each_step(schedule: str) -> None:
    def share(step: int) -> float:
        if step < WARM_UP:
            return step / WARM_UP
        done = (step - WARM_UP) / (STEPS - WARM_UP)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]

    expected = [RATE * share(step) for step in range(STEPS)]
    assert rates(settings(schedule=schedule)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("alone", [False, True])
def test_matrices_decay_and_vectors_do_not(alone: bool) -> None:
    """Without a gradient AdamW only decays: a step multiplies by 1 - rate * decay."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = build_adamw(model, settings(weight_decay=0.1), on_host=False, alone=alone)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        kept = 1 - RATE * 0.1 if value.dim() == 2 else 1.0
        torch.testing.assert_close(value.detach(), before[name] * kept)


def test_scales_do_not_decay_though_peft_shapes_them_as_matrices() -> None:
    """They start at 1: decay would shrink the model's layers."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    scales = peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    model = peft.inject_adapter_in_model(scales, model)
    optimizer = build_adamw(model, settings(weight_decay=0.1), on_host=False)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decays[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert found == {"0.ia3_l.default": 0.0}


def test_what_is_frozen_is_not_given_to_the_optimizer() -> None:
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    groups = build_adamw(model, settings(), on_host=False).param_groups
    assert [parameter is model.weight for group in groups for parameter in group["params"]] == [True]
