"""DeepSpeed's data-parallel engine (ZeRO 0-3, offload) around a model whose forward is the training loss.

The loss is computed inside ``engine.forward``: under ZeRO-3 the weights exist only there.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dualtok.distributed.deepspeed_config import Json, inference_config, offloads_optimizer, zero_stage
from dualtok.model.load import load_causal_lm
from dualtok.model.loss_backends import load_backend
from dualtok.model.losses import SignalModel, TokenLossModel, check_batch, require_faithful
from dualtok.model.norms import total_norm
from dualtok.monitor.timing import BACKWARD, FORWARD, OPTIMIZER, PhaseTimer
from dualtok.objective.selection import RankGather
from dualtok.train.engines.objective_model import ObjectiveModel
from dualtok.train.engines.states import states_of
from dualtok.train.optimizer import SkippingAdamW, build_adamw, build_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from dualtok.config.model import ModelConfig
    from dualtok.config.train import TrainConfig
    from dualtok.distributed.layout import Layout
    from dualtok.distributed.ranks import Ranks
    from dualtok.model.adapters import Adapters
    from dualtok.model.losses import Batch
    from dualtok.objective.loss import Objective
    from dualtok.objective.token_weights import TokenWeights, WeightedLoss
    from dualtok.train.engines.states import States

# Imported where they are used, for what they take to load: DeepSpeed (2 s), transformers (1 to 4 s).


@dataclass
class ZeroEngine:
    """Data-parallel training: every rank runs the whole model on its own blocks, and holds its share of the states."""

    engine: Any
    model: ObjectiveModel
    layout: Layout
    keep_alive: object
    timer: PhaseTimer = field(default_factory=PhaseTimer)

    def __post_init__(self) -> None:
        """Ask how the optimizer steps: DeepSpeed clips with torch, and forgets the norm, at ZeRO-0 in fp32."""
        self._steps_with_torch = isinstance(self.engine.optimizer, torch.optim.Optimizer)
        self._norm = float("nan")
        if self._steps_with_torch:
            self.engine.clip_fp32_gradients = self._clip

    def _clip(self) -> None:
        """Clip by the norm that was taken before the step; DeepSpeed's own is a float32 sum on host cores."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parameters, self.engine.gradient_clipping(), torch.tensor(self._norm))

    def to_device(self, batch: Batch) -> Batch:
        """Move a batch to this rank's device."""
        return {name: tensor.to(self.layout.ranks.device, non_blocking=True) for name, tensor in batch.items()}

    def check(self, batch: Batch, precision: str) -> None:
        """Compare dualtok's head and document boundaries with what they should be, once, before training."""
        with torch.no_grad():
            errors = self.engine(self.to_device(check_batch(batch)), check=True)
        require_faithful(errors, precision, type(self.model.causal_lm).__name__)

    def train_step(self, micro_batches: Sequence[Batch]) -> list[WeightedLoss]:
        """Run forward and backward of each micro-batch, and the optimizer after the last."""
        self.engine.train()
        batches = [self.to_device(batch) for batch in micro_batches]
        return [
            self._micro_step(batch, weights) for batch, weights in zip(batches, self._weights(batches), strict=True)
        ]

    def _weights(self, batches: Sequence[Batch]) -> Sequence[TokenWeights | None]:
        """Return how the step's tokens count, where all of them must be known together; None where not."""
        if len(batches) == 1 or not self.model.objective.spans_step:
            return [None] * len(batches)
        self.model.scoring = True
        try:
            # With the same random numbers dropout leaves out the same units in this pass and in the one that trains.
            with same_random_numbers(self.layout.ranks.device), torch.no_grad(), self.timer.phase(FORWARD):
                token_losses = [self.engine(batch) for batch in batches]
        finally:
            self.model.scoring = False
        return self.model.objective.weigh(token_losses, batches, self.model.gather)

    def _micro_step(self, batch: Batch, weights: TokenWeights | None) -> WeightedLoss:
        self.model.weights = weights
        with self.timer.phase(FORWARD):
            loss = self.engine(batch)
        with self.timer.phase(BACKWARD):
            self.engine.backward(loss)
        with self.timer.phase(OPTIMIZER):
            if self._steps_with_torch and self.engine.is_gradient_accumulation_boundary():
                self._norm = _gradient_norm(self.model)
                if isinstance(self.engine.optimizer, SkippingAdamW):
                    self.engine.optimizer.judge(self._norm)
            self.engine.step()
        outcome, self.model.outcome = self.model.outcome, None
        assert outcome is not None
        return outcome

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Return the token losses [b, t] of this rank's batch without gradients."""
        self.engine.eval()
        losses: torch.Tensor = self.engine(self.to_device(batch))
        return losses

    def gradient_norm(self) -> float:
        """Return the norm of the global gradient of the last optimizer step, before clipping."""
        return float(self._norm if self._steps_with_torch else self.engine.get_global_grad_norm())

    def skipped_steps(self) -> int:
        """Return the optimizer steps that DeepSpeed left out because a gradient was not finite."""
        return int(self.engine.skipped_steps)

    def learning_rate(self) -> float:
        """Return the learning rate of the next optimizer step."""
        return float(self.engine.get_lr()[0])

    def zero_stage(self) -> int:
        """Return the engine's ZeRO stage."""
        return int(self.engine.zero_optimization_stage())

    def states(self) -> States:
        """Return what was learned, as checkpoints hold it."""
        return states_of(self.engine, dict(self.model.causal_lm.named_parameters()), self.layout.data_parallel)


def build_zero_engine(
    folder: Path | str,
    model: ModelConfig,
    train: TrainConfig,
    *,
    config: Json,
    objective: Objective,
    total_steps: int,
    layout: Layout,
    adapters: Adapters | None = None,
) -> ZeroEngine:
    """Load a model and wrap it, its AdamW and its schedule in a DeepSpeed engine.

    Args:
        folder: Hugging Face folder or hub name of the starting weights.
        model: attention and activation checkpointing.
        train: optimizer, schedule, precision.
        config: complete DeepSpeed configuration (:func:`dualtok.distributed.deepspeed_config.training_config`).
        objective: the loss; called inside the engine's forward with this rank's token losses.
        total_steps: optimizer steps at which the schedule ends.
        layout: the job's ranks, in one stage.
        adapters: train these and freeze the rest; None trains all weights.
    """
    import deepspeed

    quiet_deepspeed()
    ranks = layout.data_parallel
    keep_alive = _partition_while_loading(config)
    causal_lm = load_causal_lm(
        folder,
        attention=model.attention,
        activation_checkpointing=model.activation_checkpointing,
        quantize=model.quantize,
        trust_remote_code=model.trust_remote_code,
    )
    if adapters is not None:
        adapters.put_into(causal_lm)
    gather = RankGather(ranks.gather, ranks.world_size) if ranks.world_size > 1 else None
    kernel = load_backend(train.loss_backend, causal_lm, ranks.device, train.precision)
    wrapped = ObjectiveModel(causal_lm, objective, gather, memory_mib=train.loss_memory_mib, kernel=kernel)
    optimizer = build_adamw(wrapped, train, on_host=offloads_optimizer(config), alone=zero_stage(config) == 0)
    engine, _, _, _ = deepspeed.initialize(
        model=wrapped, optimizer=optimizer, lr_scheduler=build_schedule(train, total_steps), config=config
    )
    return ZeroEngine(engine, wrapped, layout, keep_alive, PhaseTimer(layout.ranks.device))


def build_forward_only(
    folder: Path | str,
    *,
    precision: str,
    batch_size: int,
    deepspeed_json: str | Json | None,
    ranks: Ranks,
    signals: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]] | None = None,
    trust_remote_code: bool = False,
) -> Callable[[Batch], Any]:
    """Return a function from a batch to token losses [b, t], or to the audit's signals when ``signals`` is given.

    Args:
        folder: Hugging Face folder or hub name.
        precision: ``fp32`` or ``bf16``.
        batch_size: blocks per call and rank.
        deepspeed_json: configuration (file or content) of a ZeRO-3 engine that shards the weights over the ranks; None
            keeps a whole copy on every rank. With it every rank must make the same number of calls.
        ranks: the job's ranks.
        signals: function of (logits [b, t, v], labels [b, t]) that is kept per token instead of the loss.
        trust_remote_code: run Python code that the model brings.
    """
    config = None if deepspeed_json is None else inference_config(deepspeed_json, precision, batch_size)
    keep_alive = None if config is None else _partition_while_loading(config)
    causal_lm = load_causal_lm(folder, precision=precision, trust_remote_code=trust_remote_code)
    del keep_alive  # or the next model, e.g. the one in training, would be partitioned by this one's settings
    wrapped = TokenLossModel(causal_lm) if signals is None else SignalModel(causal_lm, signals)
    if config is None:
        runner: Any = wrapped.to(ranks.device)
    else:
        import deepspeed

        quiet_deepspeed()
        runner = deepspeed.initialize(model=wrapped, config=config)[0]
    runner.eval()

    checked = False

    def forward(batch: Batch) -> Any:
        nonlocal checked
        here = {name: tensor.to(ranks.device) for name, tensor in batch.items()}
        with torch.no_grad():
            if not checked:
                require_faithful(runner(check_batch(here), check=True), precision, type(causal_lm).__name__)
                checked = True
                if config is not None:
                    _trace_again(runner)
            return runner(here)

    return forward


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave the random numbers of the host and of an accelerator as they were found."""
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    host, there = torch.get_rng_state(), None if accelerator is None else accelerator.get_rng_state(device)
    try:
        yield
    finally:
        torch.set_rng_state(host)
        if accelerator is not None:
            accelerator.set_rng_state(there, device)


def _trace_again(engine: Any) -> None:
    """Let a forward-only ZeRO-3 engine learn the order of its modules from the next pass.

    The first one, of the check, visits each module twice. Going by that order DeepSpeed would keep every parameter
    gathered for a second visit that no later pass makes: the whole model, on the accelerator, for good.
    """
    coordinator = engine.optimizer.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def _gradient_norm(model: torch.nn.Module) -> float:
    """Return the norm of the gradients, which are reduced over the ranks by now; 0 when no parameter has one."""
    return float(total_norm(parameter.grad for parameter in model.parameters() if parameter.grad is not None))


def quiet_deepspeed() -> None:
    """Leave the terminal to the progress bar: DeepSpeed's own INFO lines are dropped, warnings stay."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def _partition_while_loading(config: Json) -> object:
    """Let transformers read weights straight into ZeRO-3 partitions; the result must outlive the loading."""
    if zero_stage(config) != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)
