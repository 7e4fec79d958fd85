"""DualTrainer and the loss function: gradients, evaluation, what is logged, what is refused."""

from __future__ import annotations

import copy
import json
import math
from functools import wraps
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer

from dualtok.errors import ConfigError, DataError
from dualtok.integrations.transformers import (
    DualCollator,
    DualConfig,
    DualTrainer,
    dual_loss,
    score_dataset,
    with_token_losses,
)
from dualtok.objective.head import LossHead
from tests.integrations.transformers.support import Gradients, arguments, documents, dual_oracle, tiny_llama

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return score_dataset(tiny_llama(1), documents(), cache_dir=tmp_path_factory.mktemp("scores"))


def oracle_gradients(scored: Dataset, accumulation: int, *, by_tokens: bool) -> dict[str, torch.Tensor]:
    """Return the first step's gradients in plain torch: the mean over micro-batches, or weighted by their tokens."""
    model = tiny_llama(2)
    parts = [dual_oracle(model, list(scored.select(range(4 * i, 4 * i + 4)))) for i in range(accumulation)]
    tokens = [n for _, n in parts]
    assert accumulation == 1 or len(set(tokens)) > 1, "micro-batches of equal size cannot tell the two apart"
    shares = [n / sum(tokens) if by_tokens else 1 / accumulation for n in tokens]
    sum(share * loss for share, (loss, _) in zip(shares, parts, strict=True)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], known: dict[str, torch.Tensor]) -> None:
    assert found.keys() == known.keys()
    for name, gradient in known.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("pack_to", [None, 64])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_trainers_gradient_is_that_of_plain_torch(
    scored: Dataset, tmp_path: Path, accumulation: int, pack_to: int | None
) -> None:
    seen = Gradients()
    settings = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=accumulation)
    collator = DualCollator(pack_to=pack_to)
    DualTrainer(tiny_llama(2), settings, collator, train_dataset=scored, callbacks=[seen]).train()
    assert_same(seen.steps[0], oracle_gradients(scored, accumulation, by_tokens=False))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("averaged", [True, False])
def test_the_loss_functions_gradient_and_loss_are_those_of_plain_torch(
    scored: Dataset, tmp_path: Path, accumulation: int, averaged: bool
) -> None:
    seen = Gradients()
    settings = arguments(
        tmp_path, max_steps=1, gradient_accumulation_steps=accumulation, average_tokens_across_devices=averaged
    )
    trainer = Trainer(
        with_token_losses(tiny_llama(2)),
        settings,
        DualCollator(),
        train_dataset=scored,
        callbacks=[seen],
        compute_loss_func=dual_loss(DualConfig()),
    )
    trainer.train()
    assert_same(seen.steps[0], oracle_gradients(scored, accumulation, by_tokens=True))
    parts = [dual_oracle(tiny_llama(2), list(scored.select(range(4 * i, 4 * i + 4)))) for i in range(accumulation)]
    known = sum(float(loss.detach()) * n for loss, n in parts) / sum(n for _, n in parts)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(known, rel=1e-4)


def test_the_settings_reach_the_loss(scored: Dataset, tmp_path: Path) -> None:
    seen = Gradients()
    settings, dual = arguments(tmp_path, max_steps=1), DualConfig(alpha=0.25)
    DualTrainer(tiny_llama(2), settings, train_dataset=scored, callbacks=[seen], dual=dual).train()
    model = tiny_llama(2)
    dual_oracle(model, list(scored.select(range(4))), alpha=0.25)[0].backward()
    assert_same(seen.steps[0], {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize("kind", ["trainer", "function"])
def test_evaluation_reports_the_plain_loss(scored: Dataset, tmp_path: Path, kind: str) -> None:
    settings = arguments(tmp_path)
    unseen = documents(23, seed=5)
    plain = Trainer(tiny_llama(2), settings, DualCollator(), eval_dataset=unseen).evaluate()["eval_loss"]
    for data in (unseen, score_dataset(tiny_llama(1), unseen, cache_dir=tmp_path)):  # with and without the column
        if kind == "trainer":
            trainer: Trainer = DualTrainer(tiny_llama(2), settings, train_dataset=scored, eval_dataset=data)
        else:
            model = with_token_losses(tiny_llama(2))
            trainer = Trainer(model, settings, DualCollator(), eval_dataset=data, compute_loss_func=dual_loss())
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-5)


def test_metrics_of_the_logits_can_be_asked_for(scored: Dataset, tmp_path: Path) -> None:
    shapes: list[Any] = []

    def count(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"count": float(len(prediction.predictions))}

    settings, data = arguments(tmp_path), scored.select(range(6))
    metrics = DualTrainer(tiny_llama(2), settings, eval_dataset=data, train_dataset=scored, compute_metrics=count)
    assert metrics.evaluate()["eval_count"] == 6
    assert shapes[0][0][2] == 128


def test_the_parts_of_the_loss_are_logged_as_means_since_the_last_entry(scored: Dataset, tmp_path: Path) -> None:
    logs = []
    for every in (1, 2):
        settings = arguments(tmp_path, logging_steps=every, max_steps=4, gradient_accumulation_steps=2)
        trainer = DualTrainer(tiny_llama(2), settings, train_dataset=scored, eval_dataset=scored.select(range(5)))
        trainer.train()
        logs.append([line for line in trainer.state.log_history if "loss" in line])
    for line in (*logs[0], *logs[1]):
        assert line["loss/dual"] == pytest.approx(line["loss"], rel=1e-5)
        assert line["share/hard"] + line["share/memorized"] + line["share/neutral"] == pytest.approx(1)
        assert {"loss/hard", "loss/plain", "optimizer/gradient_norm", "memory/peak_gib"} <= line.keys()
        assert math.isfinite(json.loads(json.dumps(line))["loss/memorized"])
    assert logs[1][0]["loss/dual"] == pytest.approx((logs[0][0]["loss/dual"] + logs[0][1]["loss/dual"]) / 2, rel=1e-5)


def test_what_is_saved_is_the_plain_model(scored: Dataset, tmp_path: Path) -> None:
    trainer = DualTrainer(tiny_llama(2), arguments(tmp_path, max_steps=3), train_dataset=scored)
    assert isinstance(trainer.model.lm_head, LossHead)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.tensor([scored[0]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)
        twin = copy.deepcopy(trainer.model)
        twin.lm_head.weight.zero_()  # tied: a copy must not look at the original
        assert float(twin(input_ids=ids, shift_labels=ids)["token_losses"].std()) < 1e-6


def test_training_resumes_from_the_trainers_checkpoint(scored: Dataset, tmp_path: Path) -> None:
    def losses(steps: int, resume: bool) -> list[float]:
        settings = arguments(
            tmp_path, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"
        )
        trainer = DualTrainer(tiny_llama(2), settings, train_dataset=scored)
        trainer.train(resume_from_checkpoint=resume)
        return [line["loss/dual"] for line in trainer.state.log_history if "loss/dual" in line]

    whole = losses(4, resume=False)
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "aside")
    assert losses(4, resume=True) == pytest.approx(whole, rel=1e-5)


def test_adapters_are_trained_alone(scored: Dataset, tmp_path: Path) -> None:
    def with_adapters() -> Any:
        torch.manual_seed(0)
        settings = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
        return get_peft_model(tiny_llama(2), settings)

    seen, model = Gradients(), with_adapters()
    trainer = DualTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=scored, callbacks=[seen])
    trainer.train()
    known = with_adapters()
    dual_oracle(known, list(scored.select(range(4))))[0].backward()
    gradients = {name: p.grad for name, p in known.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in gradients)
    assert_same(seen.steps[0], gradients)
    trainer.save_model(str(tmp_path / "adapter"))
    PeftModel.from_pretrained(tiny_llama(2), tmp_path / "adapter")


def test_an_adapter_on_the_head_is_called_chunk_by_chunk(scored: Dataset, tmp_path: Path) -> None:
    def with_adapters() -> Any:
        torch.manual_seed(0)
        model = tiny_llama(2, tie_word_embeddings=False)
        return get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=4, init_lora_weights=False))

    seen = Gradients()
    settings, dual = arguments(tmp_path, max_steps=1), DualConfig(loss_memory_mib=0.01)
    DualTrainer(with_adapters(), settings, train_dataset=scored, callbacks=[seen], dual=dual).train()
    known = with_adapters()
    dual_oracle(known, list(scored.select(range(4))))[0].backward()
    assert_same(seen.steps[0], {name: p.grad for name, p in known.named_parameters() if p.requires_grad})


def test_bf16_is_near_fp32(scored: Dataset, tmp_path: Path) -> None:
    losses = []
    for bf16 in (False, True):
        trainer = DualTrainer(tiny_llama(2), arguments(tmp_path, bf16=bf16), train_dataset=scored)
        trainer.train()
        losses.append([line["loss/plain"] for line in trainer.state.log_history if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1] != losses[0], "nothing was rounded"


def test_another_architecture_and_its_logits(scored: Dataset, tmp_path: Path) -> None:
    """Granite divides its logits; its loss head has to do so as well."""
    changes = {"model_type": "granite", "logits_scaling": 4.0}
    seen = Gradients()
    settings = arguments(tmp_path, max_steps=1)
    DualTrainer(tiny_llama(2, **changes), settings, train_dataset=scored, callbacks=[seen]).train()
    model = tiny_llama(2, **changes)
    dual_oracle(model, list(scored.select(range(4))))[0].backward()
    assert_same(seen.steps[0], {name: p.grad for name, p in model.named_parameters()})


def test_a_model_that_changes_its_logits_unknown_to_dualtok_is_refused(scored: Dataset, tmp_path: Path) -> None:
    model = tiny_llama(2)
    plain = type(model)

    @wraps(plain.forward)
    def forward(self: Any, *given: Any, **named: Any) -> Any:
        output = plain.forward(self, *given, **named)
        output.logits = output.logits * 1.5
        return output

    model.__class__ = type("LlamaOfAnotherKind", (plain,), {"forward": forward})
    with pytest.raises(ConfigError, match=r"its logits differ from lm_head"):
        DualTrainer(model, arguments(tmp_path), train_dataset=scored).train()


@pytest.mark.parametrize(
    ("changes", "words"), [({"label_smoothing_factor": 0.1}, "label_smoothing_factor"), ({"fp16": True}, "fp16")]
)
def test_settings_that_cannot_be_are_refused(
    scored: Dataset, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    settings = arguments(tmp_path)
    for name, value in changes.items():
        setattr(settings, name, value)
    with pytest.raises(ConfigError, match=words):
        DualTrainer(tiny_llama(2), settings, train_dataset=scored)


def test_two_losses_at_once_are_refused(scored: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compute_loss_func: would have no effect"):
        DualTrainer(tiny_llama(2), arguments(tmp_path), train_dataset=scored, compute_loss_func=dual_loss())


def test_missing_columns_are_told(scored: Dataset, tmp_path: Path) -> None:
    bare, settings = scored.remove_columns("reference_loss"), arguments(tmp_path)
    with pytest.raises(DataError, match="no column reference_loss; make it with score_dataset"):
        DualTrainer(tiny_llama(2), settings, train_dataset=bare)
    with pytest.raises(DataError, match="reference_loss: the batches do not have it"):
        DualTrainer(tiny_llama(2), settings, train_dataset=list(bare)).train()
    # The Trainer drops the column, because the model's forward does not take it.
    plain = Trainer(tiny_llama(2), settings, DualCollator(), train_dataset=scored, compute_loss_func=dual_loss())
    with pytest.raises(ConfigError, match=r"no token losses: give the Trainer with_token_losses\(model\)"):
        plain.train()
    model = with_token_losses(tiny_llama(2))
    with pytest.raises(DataError, match="the Trainer has removed it"):
        Trainer(model, settings, DualCollator(), train_dataset=bare, compute_loss_func=dual_loss()).train()


def test_scope_step_needs_the_trainer() -> None:
    with pytest.raises(ConfigError, match="scope: step needs all micro-batches"):
        dual_loss(DualConfig(scope="step"))


def test_reference_losses_that_were_rounded_are_refused() -> None:
    model, ids = with_token_losses(tiny_llama(2)), torch.tensor([[1, 2, 3]])
    with pytest.raises(ConfigError, match=r"has become torch\.bfloat16"):
        model(input_ids=ids, shift_labels=ids, reference_loss=torch.zeros(1, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("settings", [{"hard_share": 2.0}, {"loss_memory_mib": 0.0}, {"loss_backend": "none"}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        DualConfig(**settings)
