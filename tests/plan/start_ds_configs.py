"""Started under torchrun by test_ds_configs.py: every file of ds_configs/ starts an engine that takes a step.

All run on two ranks: those with ``pipeline`` in their names in two stages, ``zero0.json`` in fp32, all others in
bf16. The folder of ``1gpu_files.json``'s states is the only thing changed. Rank 0 writes the losses as JSON.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from dualtok.config.model import ModelConfig
from dualtok.config.train import PipelineConfig, TrainConfig
from dualtok.distributed.deepspeed_config import training_config
from dualtok.distributed.layout import build_layout
from dualtok.distributed.ranks import Ranks, join_ranks, leave_ranks
from dualtok.model.fresh import write_fresh_weights
from dualtok.objective.loss import build_objective
from dualtok.train.engines.build import build_engine
from tests.plan.support import LLAMA

LENGTH = 8


def main(files: list[Path], folder: Path) -> None:
    """Start them all, one after the other."""
    ranks = join_ranks()
    if ranks.is_first:
        write_fresh_weights(AutoConfig.for_model(**LLAMA), 0, folder / "weights")
    ranks.barrier()
    losses = {}
    # Pipelines last: DeepSpeed remembers their groups, and gives them to a plain engine that follows.
    for file in sorted(files, key=lambda file: "pipeline" in file.stem):
        losses[file.stem] = take_a_step(file, folder, ranks)
        if ranks.is_first:
            print(file.stem, *losses[file.stem], flush=True)
    if ranks.is_first:
        (folder / "losses.json").write_text(json.dumps(losses))
    leave_ranks()


def take_a_step(file: Path, folder: Path, ranks: Ranks) -> tuple[float, int]:
    """Return the loss of a step and the ZeRO stage of the engine that took it."""
    engine_name = "sharded_pipeline" if "sharded" in file.stem else "pipeline" if "pipeline" in file.stem else "zero"
    settings: dict[str, Any] = json.loads(file.read_text())
    optimizer = settings["zero_optimization"].get("offload_optimizer", {})
    if optimizer.get("device") == "nvme":
        optimizer["nvme_path"] = str(folder / "states")
        (folder / "states").mkdir(exist_ok=True)
        file = folder / f"{file.stem}-{ranks.rank}.json"
        file.write_text(json.dumps(settings))
    train = TrainConfig(
        learning_rate=1e-3,
        batch_size=4,
        steps=5,
        gradient_accumulation=2,
        deepspeed=str(file),
        engine=engine_name,
        precision="fp32" if file.stem == "zero0" else "bf16",
        pipeline=None if engine_name == "zero" else PipelineConfig(stages=2),
    )
    layout = build_layout(ranks, train.stages)
    engine: Any = build_engine(
        folder / "weights",
        ModelConfig(path=str(folder / "weights")),
        train,
        config=training_config(train, layout.data_parallel.world_size),
        objective=build_objective("causal_lm"),
        total_steps=5,
        layout=layout,
    )
    ids = torch.arange(LENGTH).repeat(4 // 2 // layout.data_parallel.world_size, 1)
    batch = {"input_ids": ids, "position_ids": torch.arange(LENGTH).repeat(len(ids), 1), "labels": ids}
    own = [float(outcome.loss) for outcome in engine.train_step([batch, batch])]  # a pipeline's last stage has some
    losses = [loss for each in ranks.gather_objects(own) for loss in each]
    loss = sum(losses) / len(losses)
    assert math.isfinite(engine.gradient_norm()), file
    stage = engine.zero_stage()
    engine.engine.destroy()
    return loss, stage


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[2:]], Path(sys.argv[1]))
