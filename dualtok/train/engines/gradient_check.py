"""Whether the installed DeepSpeed's gradients are right under accumulation, for a model that returns logits too.

DeepSpeed 0.18.0 to 0.19.5 divided them once too often at ZeRO stages 0 to 2, without a word; Adam hides most of it. A
step of plain gradient descent with learning rate 1 is the gradient itself, which is compared with autograd's.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from dualtok.distributed.ranks import Ranks

# Imported where they are used, for what they take to load: DeepSpeed (2 s).

ACCUMULATION, ROWS, TOKENS, VOCABULARY, WIDTH = 4, 2, 8, 32, 16
TOLERANCE = 1e-3
"""Largest relative error, by norm, that is rounding in float32."""


class _Small(nn.Module):
    """Returns the loss and the logits, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(torch.tanh(self.middle(self.embeddings(tokens))))
        return cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def gradient_error(ranks: Ranks, stage: int) -> float:
    """Return the relative error, by norm, of DeepSpeed's gradients under accumulation; every rank takes part.

    Args:
        ranks: the whole job.
        stage: the ZeRO stage.
    """
    import deepspeed

    with torch.random.fork_rng():
        torch.manual_seed(0)
        alone = _Small().to(ranks.device)
        tokens = torch.randint(0, VOCABULARY, (ACCUMULATION, ranks.world_size, 2, ROWS, TOKENS)).to(ranks.device)
    trained = copy.deepcopy(alone)
    before = [parameter.detach().clone() for parameter in alone.parameters()]
    losses = [alone(*tokens[step, rank])[0] for step in range(ACCUMULATION) for rank in range(ranks.world_size)]
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(alone.parameters()))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": ACCUMULATION,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,  # left out, it is 1.0
    }
    engine, *_ = deepspeed.initialize(
        model=trained, optimizer=torch.optim.SGD(trained.parameters(), lr=1.0), config=config
    )
    for step in range(ACCUMULATION):
        loss, _ = engine(*tokens[step, ranks.rank])
        engine.backward(loss)
        engine.step()
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        found = [old - parameter.detach() for old, parameter in zip(before, parameters, strict=True)]
    engine.destroy()
    off = sum(float((ours - theirs).double().square().sum()) for ours, theirs in zip(found, expected, strict=True))
    return float((off / sum(float(right.double().square().sum()) for right in expected)) ** 0.5)
