"""A frozen model around its forward pass alone: for scoring, the audit and the live reference."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from dualtok.distributed.deepspeed_config import Json, inference_config, zero_stage
from dualtok.model.load import load_causal_lm
from dualtok.model.losses import SignalModel, TokenLossModel, check_batch, require_faithful

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dualtok.distributed.ranks import Ranks
    from dualtok.model.losses import Batch

# Imported where they are used, for what they take to load: DeepSpeed (2 s), transformers (1 to 4 s).


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
    keep_alive = None if config is None else partition_while_loading(config)
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


def _trace_again(engine: Any) -> None:
    """Let a forward-only ZeRO-3 engine learn the order of its modules from the next pass.

    The first one, of the check, visits each module twice. Going by that order DeepSpeed 0.19.8 would keep every
    parameter gathered for a second visit that no later pass makes: the whole model, on the accelerator, for good.
    """
    coordinator = engine.optimizer.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def quiet_deepspeed() -> None:
    """Leave the terminal to the progress bar: DeepSpeed's own INFO lines are dropped, warnings stay."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def partition_while_loading(config: Json) -> object:
    """Let transformers read weights straight into ZeRO-3 partitions; the result must outlive the loading."""
    if zero_stage(config) != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)
