"""Train runs up to some step each, then preempt them: ``torchrun ... -m tests.multi_rank.train_segments
RUN.yaml:STOP[:BROKEN] ...``.

Each run starts, or goes on from its last checkpoint whatever layout wrote it, and is told to end by the signal that a
scheduler sends. In the ``BROKEN``-th step that a process takes the loss is not a number.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from dualtok.commands import train as training
from dualtok.config.load import load_run
from dualtok.distributed.ranks import leave_ranks
from dualtok.errors import Preempted


def train_segment(path: Path, stop: int, broken: int = 0) -> None:
    """Train one run until ``stop`` steps are done."""
    import deepspeed.utils.groups
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # What the engine before has left to the process: a pipeline its grid, ZeRO-3 its way to load models.
    deepspeed.utils.groups.mpu = None
    unset_hf_deepspeed_config()
    build = training.build_engine

    def build_and_stop(*arguments: Any, **settings: Any) -> Any:
        engine = build(*arguments, **settings)
        train_step, compute, taken = engine.train_step, engine.model.compute, 0

        def compute_nan(batch: Any) -> Any:
            return compute(batch) * (float("nan") if broken and taken == broken else 1.0)

        def counting(window: Any) -> Any:
            nonlocal taken
            taken += 1
            outcome = train_step(window)
            # On one rank alone: the others learn of it from the sums of the step.
            if engine.engine.global_steps == stop and engine.layout.ranks.is_first:
                os.kill(os.getpid(), signal.SIGTERM)
            return outcome

        engine.train_step, engine.model.compute = counting, compute_nan
        return engine

    training.build_engine = build_and_stop  # type: ignore[assignment]
    try:
        training.train(load_run(path), resume="if_any")
    except Preempted:
        pass
    finally:
        training.build_engine = build


def main() -> None:
    """Train the segments named on the command line, one after the other."""
    for argument in sys.argv[1:]:
        path, *numbers = argument.split(":")
        train_segment(Path(path), *map(int, numbers))
    leave_ranks()


if __name__ == "__main__":
    main()
