"""DP-SGD through Opacus: every document's gradient is clipped, noise is added, nothing else is learned from it.

A baseline of the same command, not a layout: the model is whole on every rank. Per-document gradient norms come from
ghost clipping (Li et al. 2022, arXiv 2110.05679) where Opacus has it (linear layers, embeddings), from per-document
gradients elsewhere; the second backward pass weighs each document's loss by its clipping factor.

Legend: n documents of a batch, t position, v vocabulary.
"""

from __future__ import annotations

import warnings
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dualtok.errors import ConfigError
from dualtok.model.load import load_causal_lm
from dualtok.model.losses import check_errors
from dualtok.model.norms import row_norms, total_norm
from dualtok.monitor.timing import BACKWARD, FORWARD, OPTIMIZER, PhaseTimer
from dualtok.objective.head import IGNORED_LABEL
from dualtok.train.engines.base import TrainingEngine
from dualtok.train.engines.states import ReplicatedStates
from dualtok.train.optimizer import build_adamw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualtok.model.losses import Batch
    from dualtok.objective.loss import Objective
    from dualtok.objective.token_weights import WeightedLoss
    from dualtok.train.engines.base import Blueprint
    from dualtok.train.engines.dp_account import PrivacyAccount
    from dualtok.train.engines.states import States
    from dualtok.train.guard import LossLimit

# Imported where they are used, for they need not be installed or wanted: opacus.

NOISE_SEED = 0x4E6F6973
"""Tells the noise's random numbers from those of the draws."""


class PrivateModel(nn.Module):
    """A causal language model as the loop sees it; its forward gives token losses [n, t]."""

    limit: LossLimit | None = None
    """No spike is looked for: to leave a step out because of its documents would tell of them."""

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def scale_alpha(self, scale: float) -> None:
        """Do nothing: there is no unlearning term."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the token losses in float32, 0 where a label is -100."""
        output = self.causal_lm(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        losses = nn.functional.cross_entropy(
            output.logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        )
        return losses.view(batch["labels"].shape)


@dataclass
class _Progress:
    """Counts steps, and answers as DeepSpeed's engine does."""

    basic_optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    batch_size: int
    gradient_norm: float = float("nan")
    """Norm of the last step's gradient, clipped and with its noise."""
    global_steps: int = 0
    skipped_steps: int = 0
    """No step is left out."""
    global_samples: int = 0

    def get_global_grad_norm(self) -> float:
        """Return the norm of the last step's gradient."""
        return self.gradient_norm

    def get_lr(self) -> list[float]:
        """Return the learning rate of the next optimizer step."""
        rates: list[float] = self.lr_scheduler.get_last_lr()
        return rates

    def zero_optimization_stage(self) -> int:
        """Return 0: nothing is sharded."""
        return 0

    def train_batch_size(self) -> int:
        """Return the documents expected per step."""
        return self.batch_size


@dataclass
class PrivateEngine(TrainingEngine):
    """DP-SGD on all ranks: each learns the documents that it drew, rank 0 adds the noise."""

    model: PrivateModel
    _: KW_ONLY
    account: PrivacyAccount
    hooks: Any
    """Opacus' ghost clipping."""
    optimizer: Any
    """Opacus' optimizer around AdamW."""
    objective: Objective
    seed: int

    def check(self, batch: Batch, precision: str) -> None:
        """Compare document boundaries with what they should be; blocks are packed in evaluations."""
        if len(batch["input_ids"]):  # this rank may have drawn no document
            super().check(batch, precision)

    @torch.no_grad()
    def compare(self, batch: Batch) -> torch.Tensor:
        """Return the errors of head and document boundaries on this rank's documents."""
        self.model.eval()
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        logits = self.model.causal_lm(**inputs, use_cache=False).logits
        return check_errors(self.model(batch), logits, batch["labels"])

    def train_step(self, micro_batches: Sequence[Batch]) -> list[WeightedLoss]:
        """Clip and add up the documents of all parts, add noise once, and step."""
        self.model.train()
        if not self.account.secret_seed:
            self.optimizer.generator.manual_seed(
                (NOISE_SEED + self.seed * 1_000_003 + self.engine.global_steps) % 2**63
            )
        last = len(micro_batches) - 1
        outcomes = []
        for number, batch in enumerate(micro_batches):
            outcomes.append(self._part(self.to_device(batch)))
            with self.timer.phase(OPTIMIZER):
                self.optimizer.signal_skip_step(do_skip=number < last)
                self.optimizer.step()
                if number == last:
                    self.engine.gradient_norm = float(total_norm(p.grad for p in self.optimizer.params))
                self.optimizer.zero_grad()
        self.engine.lr_scheduler.step()
        self.engine.global_steps += 1
        return outcomes

    def _part(self, batch: Batch) -> WeightedLoss:
        """Leave the sum of a part's clipped gradients in ``grad``; returns the plain objective's figures."""
        if len(batch["input_ids"]) == 0:
            for parameter in self.optimizer.params:
                parameter.grad = torch.zeros_like(parameter)
            return self.objective(torch.zeros_like(batch["labels"], dtype=torch.float32), batch)
        with self.timer.phase(FORWARD):
            token_losses = self.model(batch)
            predicted = (batch["labels"] != IGNORED_LABEL).sum(1)
            per_document = token_losses.sum(1) / predicted.clamp(min=1)
        with self.timer.phase(BACKWARD):
            per_document.mean().backward(retain_graph=True)  # Opacus' hooks take each document's norm
            factors = self.hooks.get_clipping_coef().detach()
            self.optimizer.zero_grad()
            self.hooks.disable_hooks()
            (factors * per_document).sum().backward()
            self.hooks.enable_hooks()
        return self.objective(token_losses.detach(), batch)

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Return the token losses [b, t] of this rank's batch of blocks."""
        self.model.eval()
        losses: torch.Tensor = self.model(self.to_device(batch))
        return losses

    def states(self) -> States:
        """Return what was learned, as checkpoints hold it."""
        return ReplicatedStates(self.engine, self.parameters(), self.layout.data_parallel, self.copies())


def untie(causal_lm: Any) -> None:
    """Give the output layer a weight of its own; Opacus would count a shared one's gradient twice over."""
    head, embeddings = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    causal_lm.config.tie_word_embeddings = False


def build(blueprint: Blueprint) -> PrivateEngine:
    """Load a model and put it under Opacus.

    Raises:
        ConfigError: Opacus is not installed.
    """
    try:
        from opacus.grad_sample import GradSampleHooksFastGradientClipping
        from opacus.grad_sample import grad_sample_module_fast_gradient_clipping as ghost
        from opacus.optimizers import DistributedDPOptimizerFastGradientClipping, DPOptimizerFastGradientClipping
    except ImportError:
        raise ConfigError("train.engine: opacus is not installed; run `pip install 'dualtok[dp]'`") from None

    ghost.create_norm_sample = _create_norm_sample
    account, train, ranks = blueprint.account, blueprint.train, blueprint.layout.ranks
    assert account is not None
    model = blueprint.model
    if model.ia3 is not None:
        raise ConfigError("model.ia3: has no gradient per document in opacus; use model.lora with train.engine=opacus")
    causal_lm = load_causal_lm(blueprint.folder, attention=model.attention, trust_remote_code=model.trust_remote_code)
    untie(causal_lm)
    if blueprint.adapters is not None:
        blueprint.adapters.put_into(causal_lm)
    # Embeddings take ids, which have no gradient; Opacus' hooks fire all the same.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    wrapped = PrivateModel(causal_lm).to(ranks.device)
    adamw = build_adamw(wrapped, train, on_host=False)
    hooks = GradSampleHooksFastGradientClipping(
        causal_lm, max_grad_norm=account.max_gradient_norm, loss_reduction="mean", strict=False
    )
    alone = ranks.world_size == 1
    generator = torch.Generator(device=ranks.device)
    if account.secret_seed:
        generator.seed()
    optimizer = (DPOptimizerFastGradientClipping if alone else DistributedDPOptimizerFastGradientClipping)(
        adamw,
        noise_multiplier=account.noise_multiplier,
        max_grad_norm=account.max_gradient_norm,
        expected_batch_size=train.batch_size / ranks.world_size,
        loss_reduction="mean",
        generator=generator,
    )
    return PrivateEngine(
        _Progress(adamw, blueprint.schedule()(adamw), train.batch_size),
        wrapped,
        blueprint.layout,
        PhaseTimer(ranks.device),
        account=account,
        hooks=hooks,
        optimizer=optimizer,
        objective=blueprint.objective,
        seed=blueprint.seed,
    )


def _create_norm_sample(*, param: torch.Tensor, grad_sample: torch.Tensor, max_batch_len: int) -> None:
    """Note the norm of each document's gradient of a parameter, as Opacus does for layers without a rule of their own.

    On host cores its own comes out too small for a long one, such as a matrix of GPT-2's, and clips too little.
    """
    if param.requires_grad:
        noted: Any = param
        noted._norm_sample = row_norms(grad_sample[:max_batch_len])
