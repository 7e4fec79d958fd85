"""The guard's own arithmetic."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dualtok.config.train import GuardConfig
from dualtok.distributed.ranks import ALONE
from dualtok.objective.loss import causal_lm_loss
from dualtok.train.guard import Guard, LossLimit

if TYPE_CHECKING:
    from dualtok.objective.token_weights import WeightedLoss


def outcome(*losses: float) -> WeightedLoss:
    return causal_lm_loss(torch.tensor([losses]))


def test_a_limit_is_a_multiple_of_the_median_of_good_steps() -> None:
    guard = Guard(GuardConfig(spike_factor=2.0, window=3, on_spike="skip"))
    for loss in (1.0, 5.0):
        guard.good(loss)
    assert guard.limit() == math.inf
    guard.good(2.0)
    assert guard.limit() == 4.0
    guard.good(2.0)  # the first one is forgotten: 5, 2, 2
    assert guard.limit() == 4.0
    copy = Guard(guard.config)
    copy.restore(guard.state())
    assert copy == guard
    assert Guard(GuardConfig()).limit() == math.inf


def test_the_run_ends_after_too_many_bad_steps_in_a_row() -> None:
    guard = Guard(GuardConfig(on_nan="skip", patience=2))
    assert [guard.bad(spike=False) for _ in range(2)] == ["skip", "skip"]
    guard.good(1.0)
    assert [guard.bad(spike=False) for _ in range(3)] == ["skip", "skip", "stop"]


def test_the_run_ends_after_too_many_roll_backs_even_with_good_steps_between() -> None:
    guard = Guard(GuardConfig(on_nan="roll_back", patience=2))
    answers = []
    for _ in range(3):
        answers.append(guard.bad(spike=False))
        guard.good(1.0)
    assert answers == ["roll_back", "roll_back", "stop"]


def test_alpha_is_lowered_each_time() -> None:
    guard = Guard(GuardConfig(on_nan="lower_alpha", alpha_factor=0.5))
    assert guard.bad(spike=False) == guard.bad(spike=False) == "lower_alpha"
    assert guard.alpha_scale == 0.25


def test_only_the_last_micro_batch_makes_a_step_not_count() -> None:
    limit = LossLimit(ALONE)
    limit.begin(2.5, 2)
    assert limit.factor(outcome(9.0, 1.0)) == 1.0
    assert math.isnan(limit.factor(outcome(1.0)))  # 11 / 3 > 2.5
    limit.begin(4.0, 2)
    assert limit.factor(outcome(9.0, 1.0)) == limit.factor(outcome(1.0)) == 1.0
    limit.begin(math.inf, 1)
    assert limit.factor(outcome(1e9)) == 1.0


@pytest.mark.parametrize("settings", [{"on_spike": "skip"}, {"window": 5}, {"alpha_factor": 0.1}])
def test_settings_without_effect_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no effect without"):
        GuardConfig(**settings)
