"""What PipelinedEngine and its stages ask of DeepSpeed's; real pipelines run in tests/multi_rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from dualtok.distributed.layout import Layout
from dualtok.distributed.ranks import ALONE
from dualtok.errors import ConfigError
from dualtok.monitor.timing import FORWARD, PhaseTimer
from dualtok.train.engines import pipeline
from dualtok.train.engines.pipeline import PipelinedEngine, StageEngine, mark, timed_instructions
from tests.train.engines.fake_deepspeed import FakeStage

if TYPE_CHECKING:
    from dualtok.model.losses import Batch

BATCH = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.ones(2, 4, dtype=torch.long)}
BATCH["position_ids"] = torch.arange(4).repeat(2, 1)


class Names:
    """Names of a stage that holds the second half of a model: its layer 0 is the whole model's layer 1."""

    def whole(self, name: str, stage: int) -> str:
        return name.replace("layers.0.", f"layers.{stage}.")


def layout(stage: int) -> Layout:
    return Layout(ranks=ALONE, data_parallel=ALONE, replica=ALONE, stage=stage, stages=2)


def stage_model() -> Any:
    """Return a last stage: one layer and a head of its own object."""
    causal_lm = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)]), "lm_head": nn.Linear(2, 3, bias=False)})
    return SimpleNamespace(causal_lm=causal_lm, checking=False)


def engine(stage: int, result: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch) -> PipelinedEngine:
    """Return an engine of two stages in one process: what is broadcast is kept in ``sent``."""
    model = stage_model()
    head = model.causal_lm["lm_head"].weight
    module = SimpleNamespace(get_tied_weights_and_groups=lambda: [(head, None)])
    monkeypatch.setattr(pipeline, "tied_weights", lambda _model: {"lm_head.weight": "embed.weight"})
    monkeypatch.setattr(pipeline.dist, "broadcast", lambda tensor, **named: named)
    return PipelinedEngine(FakeStage(module, result), model, layout(stage), names=Names())  # type: ignore[arg-type]


def test_a_step_is_one_schedule_over_the_whole_window(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(1, None, monkeypatch)
    assert made.train_step([BATCH, BATCH, BATCH]) == [1, 1, 1]
    [window] = made.engine.windows
    assert len(window) == 3


def test_the_last_stage_gives_the_token_losses_and_the_others_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = torch.rand(2, 4)
    assert torch.equal(engine(1, losses, monkeypatch).token_losses(BATCH), losses)
    sent: list[dict[str, Any]] = []
    first = engine(0, None, monkeypatch)
    monkeypatch.setattr(pipeline.dist, "broadcast", lambda tensor, **named: sent.append({"tensor": tensor, **named}))
    received = first.token_losses(BATCH)
    assert received.shape == (2, 4)
    assert sent[0]["tensor"] is received
    assert sent[0]["group_src"] == 1


def test_the_check_runs_in_a_forward_pass_of_its_own_and_refuses_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(1, torch.zeros(2), monkeypatch)
    seen: list[bool] = []
    begin = made.engine.begin

    def watched(window: list[Batch]) -> list[Batch]:
        seen.append(made.model.checking)
        begun: list[Batch] = begin(window)
        return begun

    made.engine.begin = watched
    made.check(BATCH, "fp32")
    assert seen == [True]
    assert made.model.checking is False
    made.engine.result = torch.tensor([0.0, 1.0])
    with pytest.raises(ConfigError, match="ModuleDict"):
        made.check(BATCH, "fp32")


def test_parameters_have_the_whole_models_names_and_a_copy_is_the_first_stages_to_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    last, first = engine(1, None, monkeypatch), engine(0, None, monkeypatch)
    assert set(last.parameters()) == {"layers.1.weight", "layers.1.bias", "embed.weight"}
    assert last.copies() == {"embed.weight"}
    assert first.copies() == frozenset()
    names = {piece.name for piece in last.states().pieces()}
    assert names == {"layers.1.weight", "layers.1.bias"}


def test_figures_are_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(1, None, monkeypatch)
    assert (made.gradient_norm(), made.learning_rate(), made.zero_stage(), made.skipped_steps()) == (4.0, 0.125, 1, 3)


def test_sizes_of_hidden_states_are_sent_again_when_batches_change_theirs() -> None:
    stage: Any = object.__new__(StageEngine)
    nn.Module.__init__(stage)
    resets: list[int] = []
    stage.reset_activation_shape = lambda: resets.append(len(resets))
    short = {name: tensor[:, :2] for name, tensor in BATCH.items()}
    drawn = list(stage.begin([BATCH, BATCH]))
    assert [ids.shape for ids, _ in drawn] == [(2, 4)] * 2
    stage.begin([BATCH])
    assert resets == []
    stage.begin([short])
    assert resets == [0]
    assert (stage.outcomes, stage.total_loss) == ([], None)


def test_a_copy_does_not_count_in_any_norm() -> None:
    weight = nn.Parameter(torch.ones(2))
    mark(weight, counted=False)
    assert (weight.model_parallel, weight.ds_pipe_replicated) == (False, True)  # type: ignore[attr-defined]


def test_an_instruction_counts_its_time_as_its_phase() -> None:
    timer = PhaseTimer()
    ran: list[Any] = []
    instructions = timed_instructions({pipeline.schedule.ForwardPass: lambda engine, buffer: ran.append(buffer)})
    with timer.step():
        instructions[pipeline.schedule.ForwardPass](SimpleNamespace(timer=timer), 7)
    assert ran == [7]
    assert timer.take().phases[FORWARD] > 0
