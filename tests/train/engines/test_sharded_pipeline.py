"""What stands between DeepSpeed's pipeline and ZeRO-3, piece by piece; real ones run in tests/multi_rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import nn

from dualtok.train.engines import sharded_pipeline
from dualtok.train.engines.pipeline import StageEngine
from dualtok.train.engines.sharded_pipeline import KEPT, ShardedStageEngine, UntracedCoordinator


def stage(**attributes: Any) -> Any:
    """Return a stage's engine without what DeepSpeed sets up."""
    made: Any = object.__new__(ShardedStageEngine)
    nn.Module.__init__(made)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def test_the_one_question_of_the_pipelines_assert_is_answered_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepSpeedEngine, "zero_optimization_stage", lambda _self: 3)
    made = stage(_asked_by_pipeline=True)
    assert [made.zero_optimization_stage() for _ in range(3)] == [1, 3, 3]


def test_each_backward_pass_awaits_the_gradients_counted_in_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    vars(module[0])["ds_grads_remaining"] = 2
    seen: list[tuple[int, bool]] = []
    flags: list[str] = []
    epilogues: list[bool] = []
    monkeypatch.setattr(StageEngine, "_exec_forward_pass", lambda _self, _buffer: None)

    def backward(self: Any, _buffer: int) -> None:
        seen.append((module[0].ds_grads_remaining, self._force_grad_boundary))
        vars(module[0])["ds_grads_remaining"] = 0  # as DeepSpeed's hooks count down

    monkeypatch.setattr(StageEngine, "_exec_backward_pass", backward)
    made = stage(
        module=module,
        micro_batches=2,
        _backwarded=0,
        optimizer=SimpleNamespace(clear_backward_seen_flag=lambda: flags.append("cleared")),
        is_last_stage=lambda: False,
        _backward_epilogue=lambda: epilogues.append(made._force_grad_boundary),
    )
    made._exec_forward_pass(0)
    made._exec_backward_pass(0)
    made._exec_backward_pass(1)  # two in a row, in the cool-down
    assert seen == [(2, False), (2, True)]
    assert flags == ["cleared"] * 2
    assert epilogues == [False, True]  # each reduces its gradients; the last moves them to the optimizer
    assert made._force_grad_boundary is False


def test_a_stage_with_the_loss_leaves_the_epilogue_to_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[bool] = []
    monkeypatch.setattr(StageEngine, "_exec_backward_pass", lambda self, _buffer: ran.append(self._force_grad_boundary))
    made = stage(
        _awaited=[],
        micro_batches=1,
        _backwarded=0,
        optimizer=SimpleNamespace(clear_backward_seen_flag=lambda: None),
        is_last_stage=lambda: True,
        _backward_epilogue=lambda: pytest.fail("twice"),
    )
    made._exec_backward_pass(0)
    assert ran == [True]


def test_the_boundary_is_left_when_a_backward_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: Any, _buffer: int) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(StageEngine, "_exec_backward_pass", fail)
    made = stage(
        _awaited=[], micro_batches=1, _backwarded=0, optimizer=SimpleNamespace(clear_backward_seen_flag=lambda: None)
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        made._exec_backward_pass(0)
    assert made._force_grad_boundary is False


def test_parameters_below_the_threshold_stay_when_their_module_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    small = SimpleNamespace(ds_persist=True, ds_active_sub_modules={5})
    large = SimpleNamespace(ds_persist=False, ds_active_sub_modules={5})
    released: list[str] = []

    def release(_self: Any, submodule: Any, forward: bool = False) -> None:
        for name, parameter in submodule.items():
            parameter.ds_active_sub_modules.discard(5)
            if not parameter.ds_active_sub_modules:  # DeepSpeed lets go of what no module uses
                released.append(name)

    monkeypatch.setattr(sharded_pipeline, "iter_params", lambda submodule: list(submodule.values()))
    monkeypatch.setattr(PartitionedParameterCoordinator, "release_sub_module", release)
    coordinator: Any = object.__new__(UntracedCoordinator)
    coordinator.release_sub_module({"small": small, "large": large})
    assert released == ["large"]
    assert KEPT not in small.ds_active_sub_modules


def test_gradients_are_reduced_once_by_each_backward_pass_alone() -> None:
    reduce = ShardedStageEngine._INSTRUCTION_MAP[schedule.ReduceGrads]
    made = stage(timer=None, optimizer=None)
    assert reduce(made) is None  # DeepSpeed's own would ask the optimizer
    assert StageEngine._INSTRUCTION_MAP[schedule.ReduceGrads] is not reduce
