"""Train several runs in one launch with naps planted in them: ``torchrun ... -m tests.multi_rank.watched_runs``.

Arguments are ``RUN.yaml=WHERE``: ``nowhere``; ``data``, a nap of rank 1 whenever it reads a micro-batch; ``passes``,
one of each rank in each forward and backward pass of its stage.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dualtok.commands import train as training
from dualtok.config.load import load_run
from dualtok.data.stream.blocks import BlockStream
from dualtok.distributed.ranks import leave_ranks

NAP = 0.5
PASS_NAP = 0.25
WALL_FILE = "wall.json"


class Nap(torch.autograd.Function):
    """A nap on the way forward and one on the way back."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
        time.sleep(PASS_NAP)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        time.sleep(PASS_NAP)
        return gradient


def train_watched(path: Path, where: str) -> None:
    """Train one run; rank 0 writes the seconds of its steps by a clock of its own."""
    import deepspeed.utils.groups
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # What the engine before has left to the process: a pipeline its grid, ZeRO-3 its way to load models.
    deepspeed.utils.groups.mpu = None
    unset_hf_deepspeed_config()
    build, read, step = training.build_engine, BlockStream.read, training.TrainingLoop.step
    seconds: list[float] = []

    def build_napping(*arguments: Any, **settings: Any) -> Any:
        engine = build(*arguments, **settings)
        if where == "passes":
            stage = engine.engine.module.stage
            forward = stage.forward
            stage.forward = lambda inputs: Nap.apply(forward(inputs))
        return engine

    def read_napping(self: BlockStream, samples: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(NAP)
        return read(self, samples)

    def timed_step(self: Any, *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return step(self, *arguments)
        finally:
            seconds.append(time.perf_counter() - started)

    training.build_engine, training.TrainingLoop.step = build_napping, timed_step  # type: ignore[method-assign]
    if where == "data":
        BlockStream.read = read_napping  # type: ignore[method-assign]
    try:
        training.train(load_run(path))
    finally:
        training.build_engine, training.TrainingLoop.step = build, step  # type: ignore[method-assign]
        BlockStream.read = read  # type: ignore[method-assign]
    if dist.get_rank() == 0:
        (path.with_suffix("") / WALL_FILE).write_text(json.dumps(seconds))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        run, _, where = argument.partition("=")
        train_watched(Path(run), where)
    leave_ranks()
