"""What ZeroEngine asks of DeepSpeed, told by an engine that writes it down; real ones run in tests/multi_rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dualtok.distributed.layout import build_layout
from dualtok.distributed.ranks import ALONE
from dualtok.errors import ConfigError
from dualtok.objective.loss import CausalLM, Dual
from dualtok.objective.settings import SelectionConfig
from dualtok.train.engines.objective_model import ObjectiveModel
from dualtok.train.engines.zero import ZeroEngine, same_random_numbers
from dualtok.train.optimizer import SkippingAdamW
from tests.support import tiny_llama_config
from tests.train.engines.fake_deepspeed import FakeEngine

if TYPE_CHECKING:
    from dualtok.model.losses import Batch
    from dualtok.objective.loss import Objective

VOCABULARY, ROWS, LENGTH = 64, 2, 8
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY}


def batch(seed: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=draw)
    labels = torch.cat([ids[:, 1:], torch.full((ROWS, 1), -100)], dim=1)
    reference = 4 + torch.rand(ROWS, LENGTH, generator=draw)
    positions = torch.arange(LENGTH).repeat(ROWS, 1)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "reference_loss": reference}


def causal_lm(**settings: Any) -> Any:
    torch.manual_seed(0)
    wanted = settings or tiny_llama_config(vocab_size=VOCABULARY)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**wanted))


def engine(
    objective: Objective | None = None,
    *,
    model: Any = None,
    optimizer: Any = "adamw",
    window: int = 1,
    clip: float = 0.0,
) -> ZeroEngine:
    wrapped = ObjectiveModel(model or causal_lm(), objective or CausalLM(), None)
    if optimizer == "adamw":
        optimizer = SkippingAdamW(wrapped.parameters(), lr=0.1)
    return ZeroEngine(FakeEngine(wrapped, optimizer, window, clip), wrapped, build_layout(ALONE))


def test_a_window_is_forward_backward_and_step_for_each_micro_batch() -> None:
    made = engine(window=3)
    made.model.eval()
    outcomes = made.train_step([batch(1), batch(2), batch(3)])
    assert made.engine.calls == ["forward", "backward", "step"] * 3
    assert made.model.training
    assert len({outcome.loss.item() for outcome in outcomes}) == 3


class AutoLoss:
    """The mean token loss of a model, by transformers' own forward."""

    def __init__(self, model: ObjectiveModel) -> None:
        self.causal_lm = model.causal_lm

    @torch.no_grad()
    def __call__(self, given: Batch) -> torch.Tensor:
        logits = self.causal_lm(given["input_ids"], position_ids=given["position_ids"], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), given["labels"].flatten())


def test_the_loss_of_a_micro_batch_is_that_before_the_step() -> None:
    made = engine()
    expected = AutoLoss(made.model)(batch(1))
    [outcome] = made.train_step([batch(1)])
    torch.testing.assert_close(outcome.loss.detach(), expected)
    assert AutoLoss(made.model)(batch(1)) < expected  # it has learned
    assert made.model.outcome is None  # no graph is kept until the next step


def test_tokens_ranked_over_a_whole_step_are_scored_first_and_weighed_together() -> None:
    objective = Dual(SelectionConfig(scope="step", hard_share=0.4, memorized_share=0.3, tau=0.0))
    made = engine(objective, window=2)
    window = [batch(1), batch(2)]
    made.model.eval()
    with torch.no_grad():
        losses = [made.model(part) for part in window]
    expected = objective.weigh(losses, window)
    outcomes = made.train_step(window)
    assert made.engine.calls == ["forward"] * 2 + ["forward", "backward", "step"] * 2
    assert not made.model.scoring
    for outcome, weights in zip(outcomes, expected, strict=True):
        assert outcome.weights.hard.tolist() == weights.hard.tolist()
    alone = [int(objective(part, given).weights.hard.sum()) for part, given in zip(losses, window, strict=True)]
    assert [int(weights.hard.sum()) for weights in expected] != alone  # the parts alone would be other tokens
    made.engine.window, made.engine.calls = 1, []
    made.train_step([batch(3)])
    assert made.engine.calls == ["forward", "backward", "step"]  # one micro-batch is the whole step


def test_dropout_leaves_out_the_same_units_when_it_scores_and_when_it_trains() -> None:
    made = engine(model=causal_lm(**GPT2), window=2)
    made.model.objective = Dual(SelectionConfig(scope="step"))
    made.model.train()
    seen: list[torch.Tensor] = []
    made.model.causal_lm.transformer.drop.register_forward_hook(lambda _module, _inputs, out: seen.append(out.detach()))
    torch.manual_seed(5)
    made.engine.optimizer = None  # the weights stay as they are
    made._steps_with_torch = False
    made.train_step([batch(1), batch(2)])
    scored_first, scored_second, trained_first, trained_second = seen
    assert torch.equal(scored_first, trained_first)
    assert torch.equal(scored_second, trained_second)
    assert (scored_first == 0).any()


def test_random_numbers_are_left_as_they_were() -> None:
    torch.manual_seed(1)
    with same_random_numbers(torch.device("cpu")):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), inside)


def test_the_norm_is_that_before_clipping_and_the_step_is_clipped_by_it() -> None:
    made = engine(model=causal_lm(), window=2, clip=0.01)
    made.engine.optimizer = torch.optim.SGD(made.model.parameters(), lr=1.0)
    made = ZeroEngine(made.engine, made.model, made.layout)
    before = [parameter.detach().clone() for parameter in made.model.parameters()]
    expected = whole_gradient(made.model, [batch(1), batch(2)])
    made.train_step([batch(1), batch(2)])
    assert made.gradient_norm() == pytest.approx(expected, rel=1e-5)
    assert made.gradient_norm() > 0.1
    changes = [old - new.detach() for old, new in zip(before, made.model.parameters(), strict=True)]
    assert float(torch.cat([change.flatten() for change in changes]).norm()) == pytest.approx(0.01, rel=1e-3)


def whole_gradient(model: ObjectiveModel, window: list[Batch]) -> float:
    """Return the norm of the mean loss's gradient, by plain autograd."""
    loss = torch.stack([model.objective(model.eval()(part), part).loss for part in window]).mean()
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    made = engine()
    before = [parameter.detach().clone() for parameter in made.model.parameters()]
    made.model.register_forward_hook(lambda _module, _inputs, out: out * float("nan"))
    made.train_step([batch(1)])
    assert made.skipped_steps() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))


def test_deepspeeds_own_figures_are_passed_on() -> None:
    made = engine(optimizer=None)
    assert (made.gradient_norm(), made.learning_rate(), made.zero_stage(), made.skipped_steps()) == (2.5, 0.25, 2, 0)


def test_token_losses_are_those_without_dropout_and_without_a_graph() -> None:
    made = engine(model=causal_lm(**GPT2))
    made.model.train()
    first, second = made.token_losses(batch(1)), made.token_losses(batch(1))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert first.shape == (ROWS, LENGTH)
    predicted = batch(1)["labels"] != -100
    torch.testing.assert_close(first[predicted].mean(), AutoLoss(made.model)(batch(1)))


def test_a_model_that_looks_across_documents_is_refused_before_training() -> None:
    made = engine()
    made.check(batch(1), "fp32")
    inner = made.model.causal_lm.model
    forward = inner.forward
    # Attention without regard to positions: the documents of a block become one.
    inner.forward = lambda input_ids, position_ids, **named: forward(
        input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1]).expand_as(input_ids), **named
    )
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        made.check(batch(1), "fp32")


def test_states_hold_the_parameters_under_the_models_names() -> None:
    made = engine()
    names = {piece.name for piece in made.states().pieces()}
    assert names == {name for name, _ in made.model.causal_lm.named_parameters()}
