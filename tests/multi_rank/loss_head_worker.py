"""Run by two ranks under torchrun: training steps of the loss head under ZeRO, each against plain torch in one process.

Every case trains two steps of two micro-batches with SGD, so that a gradient of the wrong size shows in the weights.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dualtok.distributed.layout import build_layout
from dualtok.distributed.ranks import Ranks, join_ranks
from dualtok.objective import RankGather, SelectionConfig, build_objective, dual_loss
from dualtok.train.engines.zero import ObjectiveModel, ZeroEngine

ROWS, LENGTH, VOCABULARY, STEPS, MICRO_BATCHES, RATE = 2, 12, 61, 2, 2, 0.05
TINY = 4 * 3 * VOCABULARY * 4 / 2**20
"""Memory in MiB for three rows at work and nine kept."""
CASES: dict[str, dict[str, Any]] = {
    "untied, all logits kept": {"stage": 3},
    "tied, all logits kept": {"stage": 3, "tie": True},
    "untied, chunks differ between ranks": {"stage": 3, "memory": TINY},
    "tied, chunks differ between ranks": {"stage": 3, "tie": True, "memory": TINY},
    "tied, ZeRO-1": {"stage": 1, "tie": True, "memory": TINY},
    "untied, a layer that cannot be replaced": {"stage": 3, "memory": TINY, "wrap": True},
    "tied, scope step": {"stage": 3, "tie": True, "memory": TINY, "scope": "step"},
    "untied, scope step, ZeRO-0": {"stage": 0, "scope": "step"},
}


class Wrapped(nn.Module):
    """An output layer that is no plain linear one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) * 1.5


def build(tie: bool = False, wrap: bool = False, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "gpt2",
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=LENGTH,
            tie_word_embeddings=tie,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():  # far from the uniform distribution of a fresh model
            parameter.mul_(4.0)
    if wrap:
        model.lm_head = Wrapped(model.lm_head)
    return model


def make_batch(step: int, micro: int, rank: int) -> dict[str, torch.Tensor]:
    """Return blocks of which rank 1 has few labels, so that the ranks' chunks differ in number."""
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = -100
    if rank == 1:
        labels[:, 3 + micro :] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.arange(LENGTH).repeat(ROWS, 1),
        "reference_loss": torch.rand(ROWS, LENGTH, generator=generator) * 10,
    }


def plain_losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return nn.functional.cross_entropy(logits.mT, batch["labels"], reduction="none")


def expected_weights(model: nn.Module, scope: str, world_size: int) -> dict[str, torch.Tensor]:
    """Train in one process on what all ranks see, by the formula."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        slices = [[make_batch(step, micro, rank) for rank in range(world_size)] for micro in range(MICRO_BATCHES)]
        groups = slices if scope == "micro_batch" else [[batch for micro in slices for batch in micro]]
        for group in groups:
            batch = {name: torch.cat([part[name] for part in group]) for name in group[0]}
            outcome = dual_loss(plain_losses(model, batch), batch["reference_loss"], batch["labels"] != -100)
            assert outcome.weights.memorized.any()
            assert not (outcome.weights.hard | outcome.weights.memorized)[batch["labels"] != -100].all()
            (outcome.loss / len(groups)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def engine_of(
    model: Any, ranks: Ranks, *, stage: int, memory: float | None = None, scope: Any = "micro_batch"
) -> ZeroEngine:
    objective = build_objective("dual", SelectionConfig(scope=scope))
    wrapped = ObjectiveModel(model, objective, RankGather(ranks.gather, ranks.world_size), memory_mib=memory)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=RATE)
    engine = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=config)[0]
    return ZeroEngine(engine, wrapped, build_layout(ranks))


def relative_error(case: dict[str, Any], ranks: Ranks) -> float:
    """Return how far a case's change of the weights is from the expected one, relative to that."""
    settings = {"scope": "micro_batch", **case}
    model = build(settings.pop("tie", False), settings.pop("wrap", False))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected = expected_weights(copy.deepcopy(model), settings["scope"], ranks.world_size)
    engine = engine_of(model, ranks, **settings)
    for step in range(STEPS):
        engine.train_step([make_batch(step, micro, ranks.rank) for micro in range(MICRO_BATCHES)])
    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=settings["stage"] == 3):
        found = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assert found.keys() == expected.keys()
    wrong = sum(float((found[name] - expected[name]).double().square().sum()) for name in found)
    moved = sum(float((start[name] - expected[name]).double().square().sum()) for name in found)
    return float((wrong / moved) ** 0.5)


def dropout_error(ranks: Ranks) -> float:
    """Return how far a step's loss is from what its scoring pass says: 0 when dropout drops the same units in both."""
    engine = engine_of(build(dropout=0.3), ranks, stage=3, memory=TINY, scope="step")
    torch.manual_seed(17 + ranks.rank)
    outcomes = engine.train_step([make_batch(0, micro, ranks.rank) for micro in range(MICRO_BATCHES)])
    sums = ranks.sum(torch.stack([outcome.loss.detach().double() for outcome in outcomes]).sum())
    totals = ranks.sum(torch.stack([outcome.weights.totals for outcome in outcomes]).sum(0))
    scored = totals[0, 0] / totals[0, 1] - 0.8 * totals[1, 0] / totals[1, 1]
    return float((sums / ranks.world_size / MICRO_BATCHES - scored).abs() / scored.abs())


def main() -> None:
    """Print one line per case on rank 0."""
    ranks = join_ranks()
    errors = {name: relative_error(case, ranks) for name, case in CASES.items()}
    errors["dropout, scope step"] = dropout_error(ranks)
    if ranks.is_first:
        for name, error in errors.items():
            print(f"CASE {name} | {error:.3e}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
