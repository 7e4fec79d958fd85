"""Started under torchrun by test_gathered_stages.py: what a sharded pipeline's stages gather, and hold, in a step.

Two stages of one rank each. Whatever is gathered counts, though on one rank it is a copy in memory: the engine goes the
same way as on many. Each rank writes JSON, of its second step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from transformers import AutoConfig

from dualtok.config.model import ModelConfig
from dualtok.config.train import PipelineConfig, TrainConfig
from dualtok.distributed.deepspeed_config import training_config
from dualtok.distributed.layout import build_layout
from dualtok.distributed.ranks import join_ranks, leave_ranks
from dualtok.model.fresh import write_fresh_weights
from dualtok.objective.loss import build_objective
from dualtok.train.engines.build import build_engine
from tests.plan.support import LLAMA

LENGTH, MICRO_BATCHES = 8, 4


class Watched:
    """Looks at a stage's parameters whenever a module asks for its own."""

    def __init__(self, engine: Any) -> None:
        self.module = engine.engine.module
        coordinator = engine.engine.optimizer.parameter_offload.param_coordinator
        self._fetch = coordinator.fetch_sub_module
        coordinator.fetch_sub_module = self.fetch
        self.restart()

    def restart(self) -> None:
        self.times, self.most = 0, 0

    def fetch(self, module: Any, forward: bool) -> None:
        own = list(module.parameters(recurse=False))
        self.times += sum(parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE for parameter in own)
        self._fetch(module, forward)
        held = [p.ds_numel for p in self.module.parameters() if p.ds_status == ZeroParamStatus.AVAILABLE]
        self.most = max(self.most, sum(held))


def second_step(folder: Path, ranks: Any, threshold: int, keep: bool) -> dict[str, int]:
    """Return how often parameters were gathered for a module, and how many elements were so at once."""
    file = folder / f"{threshold}-{ranks.rank}.json"
    zero: dict[str, Any] = {"stage": 3}
    if not keep:
        zero["stage3_param_persistence_threshold"] = threshold
    file.write_text(json.dumps({"zero_optimization": zero}))
    train = TrainConfig(
        learning_rate=1e-3,
        batch_size=MICRO_BATCHES,
        steps=5,
        gradient_accumulation=MICRO_BATCHES,
        precision="fp32",
        engine="sharded_pipeline",
        deepspeed=str(file),
        pipeline=PipelineConfig(stages=2, keep_gathered=keep),
    )
    layout = build_layout(ranks, 2)
    engine: Any = build_engine(
        folder / "weights",
        ModelConfig(path=str(folder / "weights")),
        train,
        config=training_config(train, 1),
        objective=build_objective("causal_lm"),
        total_steps=5,
        layout=layout,
    )
    ids = torch.arange(LENGTH)[None]
    window = [{"input_ids": ids, "position_ids": ids, "labels": ids}] * MICRO_BATCHES
    watched = Watched(engine)
    engine.train_step(window)
    watched.restart()
    engine.train_step(window)
    sizes = [parameter.ds_numel for parameter in watched.module.parameters()]
    found = {
        "times": watched.times,
        "most": watched.most,
        "whole": sum(sizes),
        "parameters": len(sizes),
        "large": sum(size > threshold for size in sizes),
        "passes": 2 * MICRO_BATCHES,
    }
    engine.engine.destroy()
    return found


def main(folder: Path) -> None:
    """Measure three engines, one after the other."""
    ranks = join_ranks()
    if ranks.is_first:
        config = AutoConfig.for_model(**{**LLAMA, "num_hidden_layers": 8})
        write_fresh_weights(config, 0, folder / "weights")
    ranks.barrier()
    kinds = {"all released": (0, False), "small ones kept": (100, False), "all kept": (0, True)}
    found = {kind: second_step(folder, ranks, *settings) for kind, settings in kinds.items()}
    (folder / f"found-{ranks.rank}.json").write_text(json.dumps(found))
    leave_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
