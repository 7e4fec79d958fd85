"""Train many layouts of one run in one launch: ``torchrun ... -m tests.multi_rank.train_cells RUN.yaml ...``.

Each run is trained as ``dualtok train`` does it; beside its metrics rank 0 writes which tokens each micro-batch learned
and unlearned, in the order of the global batch, and how near the scores came to a border of the selection.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtok.commands import train as training
from dualtok.config.load import load_run
from dualtok.distributed.ranks import leave_ranks
from dualtok.errors import ConfigError
from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from dualtok.objective.loss import DualLoss

SELECTION_FILE = "selection.json"
REFUSED_FILE = "refused.txt"


class Recorder:
    """Notes every micro-batch's selection on its way from an engine to the loop."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.rows = engine, []
        self._train_step = engine.train_step
        engine.train_step = self.train_step

    def train_step(self, micro_batches: Sequence[dict[str, torch.Tensor]]) -> list[DualLoss]:
        outcomes: list[DualLoss] = self._train_step(micro_batches)
        ranks = self.engine.layout.data_parallel
        for batch, outcome in zip(micro_batches, outcomes, strict=False):  # an inner stage has no outcome
            predicted = batch["labels"] != IGNORED_LABEL
            mine = [
                outcome.weights.hard.cpu()[predicted].tolist(),
                outcome.weights.memorized.cpu()[predicted].tolist(),
                outcome.weights.calibrated.cpu()[predicted].tolist(),
            ]
            parts = ranks.gather_objects(mine)
            hard, memorized, calibrated = ([value for part in parts for value in part[i]] for i in range(3))
            self.rows.append({"hard": hard, "memorized": memorized, "calibrated": calibrated})
        return outcomes

    def write(self, folder: Path) -> None:
        layout = self.engine.layout
        if layout.is_last_stage and layout.data_parallel.is_first:
            (folder / SELECTION_FILE).write_text(json.dumps(self.rows))
        layout.ranks.barrier()


def train_cell(path: Path) -> None:
    """Train one run; a refusal is written down instead."""
    import deepspeed.utils.groups
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # What the engine before has left to the process: a pipeline its grid, ZeRO-3 its way to load models.
    deepspeed.utils.groups.mpu = None
    unset_hf_deepspeed_config()
    recorders: list[Recorder] = []
    build = training.build_engine

    def build_and_record(*arguments: Any, **settings: Any) -> Any:
        engine = build(*arguments, **settings)
        recorders.append(Recorder(engine))
        return engine

    training.build_engine = build_and_record
    folder = path.with_suffix("")
    try:
        training.train(load_run(path))
    except ConfigError as refusal:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REFUSED_FILE).write_text(str(refusal))
        return
    finally:
        training.build_engine = build
    recorders[0].write(folder)


def main() -> None:
    """Train the runs named on the command line, one after the other."""
    for name in sys.argv[1:]:
        train_cell(Path(name))
    leave_ranks()


if __name__ == "__main__":
    main()
