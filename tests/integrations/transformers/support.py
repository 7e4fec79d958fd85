"""Tiny models and datasets, and the dual loss in plain torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments

from tests.support import tiny_llama_config

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 128


def tiny_llama(seed: int, **changes: Any) -> Any:
    """Return a freshly drawn Llama whose losses are many nats apart."""
    settings = {"vocab_size": VOCABULARY, **tiny_llama_config(initializer_range=0.25), **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def documents(count: int = 48, seed: int = 0) -> Dataset:
    """Return tokenized documents of 5 to 39 tokens; the first tokens of each are a prompt, without labels."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 40, (count,), generator=generator).tolist()
    rows = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100, -100, -100, *row[3:]] for row in rows]})


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Return settings of a short training on the CPU that logs each step."""
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        **changes,
    }
    return TrainingArguments(**settings)


class Gradients(TrainerCallback):
    """Keeps the gradients of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def reference_losses(model: Any, row: list[int]) -> torch.Tensor:
    """Return the loss of each token of one document but the first, from the model's own logits."""
    ids = torch.tensor([row])
    logits = model(input_ids=ids).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def dual_oracle(model: Any, rows: list[dict[str, Any]], *, alpha: float = 0.8) -> tuple[torch.Tensor, int]:
    """Return the dual loss of some documents with a gradient, and the number of their tokens; nothing of dualtok's."""
    losses, calibrated = [], []
    for row in rows:
        own = reference_losses(model, row["input_ids"])
        predicted = torch.tensor(row["labels"][1:]) != -100
        losses.append(own[predicted])
        calibrated.append((own.detach() - torch.tensor(row["reference_loss"][1:]))[predicted])
    loss, s = torch.cat(losses), torch.cat(calibrated)
    n = len(s)
    order = sorted(range(n), key=lambda token: -float(s[token]))
    hard = order[: math.floor(0.6 * n + 1e-9)]
    memorized = [token for token in order[n - math.floor(0.2 * n + 1e-9) :] if s[token] < 0]
    total = loss[hard].mean()
    return (total - alpha * loss[memorized].mean() if memorized else total), n
