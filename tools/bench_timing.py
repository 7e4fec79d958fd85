"""What timing every step's phases costs: the loop's own step with and without, in turns.

Without: a timer whose phases do nothing. Same process, model, data and precision (fp32); ZeRO-3 with partitioned
weights, which has the most phases per step, on one rank.

    python tools/bench_timing.py [--hidden 256] [--layers 4] [--block-length 256] [--batch-size 8] [--pairs 21]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmark_support import llama_config, paired, prepared_corpus, print_ratio, save_llama

from dualtok.commands.train import open_streams
from dualtok.config.model import ModelConfig
from dualtok.config.run import RunConfig
from dualtok.config.train import TrainConfig
from dualtok.data.manifest import load_manifest
from dualtok.data.mixed import load_sources
from dualtok.distributed.collectives import timed_collectives
from dualtok.distributed.deepspeed_config import training_config
from dualtok.distributed.layout import build_layout
from dualtok.distributed.ranks import join_ranks
from dualtok.monitor.timing import PhaseTimer
from dualtok.objective.loss import build_objective
from dualtok.train.engines.build import build_engine
from dualtok.train.loop import TrainingLoop


class NoTimer(PhaseTimer):
    """Times nothing."""

    def step(self) -> Any:
        """Do nothing."""
        return nullcontext()

    def phase(self, name: str) -> Any:
        """Do nothing."""
        return nullcontext()


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 4), ("block-length", 256), ("batch-size", 8), ("pairs", 21)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loop = build_loop(folder, options)
        timer, none = loop.engine.timer, NoTimer()
        batches = loop.batches()

        def seconds(which: PhaseTimer) -> float:
            loop.engine.timer = which  # type: ignore[misc]  # a field of this engine
            started = time.perf_counter()
            loop.step(batches)
            return time.perf_counter() - started

        with timed_collectives(timer):
            print_ratio(
                "step with timing / without", *paired(lambda: seconds(timer), lambda: seconds(none), options.pairs), "s"
            )
        times = timer.take()
        print(f"phases sum to {sum(times.phases.values()) / times.wall:.6f} of the step")


def build_loop(folder: Path, options: argparse.Namespace) -> TrainingLoop:
    """Return a loop at its first step."""
    data = prepared_corpus(folder, options.block_length, passages=600)
    config = llama_config(options.hidden, options.layers, options.block_length)
    start = save_llama(folder / "start", load_manifest(data.dir).vocabulary, 2, config)
    (folder / "zero3.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    )
    train = TrainConfig(
        learning_rate=1e-4,
        batch_size=options.batch_size,
        steps=10**6,
        deepspeed=str(folder / "zero3.json"),
        precision="fp32",
    )
    run = RunConfig(
        data=data,
        objective="causal_lm",
        output_dir=str(folder / "run"),
        train=train,
        model=ModelConfig(path=str(start)),
    )
    ranks = join_ranks()
    stream, validation = open_streams(run, load_sources(run.data, "train"), ("train", "validation"), ranks)
    engine = build_engine(
        start,
        ModelConfig(path=str(start)),
        train,
        config=training_config(train, ranks.world_size),
        objective=build_objective("causal_lm", None, None),
        total_steps=10**6,
        layout=build_layout(ranks),
    )
    return TrainingLoop(run, engine, stream, validation, 10**6)


if __name__ == "__main__":
    main()
