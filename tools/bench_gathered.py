"""What ``keep_gathered`` saves: a step of ``sharded_pipeline`` with it over one that gathers for every micro-batch.

Four ranks (2 stages x 2) hold both engines and take turns; each figure is the slowest rank's.

    python tools/bench_gathered.py [--hidden 512] [--layers 8] [--accumulation 4] [--pairs 7]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from bench_memory import BLOCK_LENGTH, RANKS, STAGES
from benchmark_support import paired, print_ratio, rank_variables, torchrun
from rank_support import dual_engine, random_block, untied_llama

from dualtok.config.train import PipelineConfig, TrainConfig
from dualtok.distributed.layout import build_layout
from dualtok.distributed.ranks import join_ranks, leave_ranks
from dualtok.model.fresh import write_fresh_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from dualtok.distributed.layout import Layout

JSON = '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'


def main() -> None:
    """Start the ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = (("hidden", 512), ("layers", 8), ("vocabulary", 8_000), ("accumulation", 4), ("pairs", 7))
    for name, default in defaults:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = untied_llama(options.hidden, options.layers, options.vocabulary, BLOCK_LENGTH)
        write_fresh_weights(config, 0, Path(folder) / "model")
        (Path(folder) / "ds.json").write_text(JSON)
        command = torchrun(RANKS, __file__, *sys.argv[1:], "--folder", folder)
        subprocess.run(command, env=rank_variables(RANKS), check=True)


def measure(options: argparse.Namespace) -> None:
    """Time both engines in turns on this rank; the first rank prints."""
    layout = build_layout(join_ranks(), STAGES)
    kept, gathered = (step(options, layout, keep_gathered=keep) for keep in (True, False))
    times = paired(kept, gathered, options.pairs)
    if layout.ranks.is_first:
        print_ratio("sharded_pipeline, step with keep_gathered / without", *times, "s")
    leave_ranks()


def step(options: argparse.Namespace, layout: Layout, *, keep_gathered: bool) -> Callable[[], float]:
    """Return a function that trains one step and returns the seconds of the slowest rank."""
    train = TrainConfig(
        learning_rate=1e-4,
        batch_size=2 * options.accumulation,
        gradient_accumulation=options.accumulation,
        steps=10**6,
        precision="fp32",
        engine="sharded_pipeline",
        deepspeed=str(options.folder / "ds.json"),
        pipeline=PipelineConfig(stages=STAGES, keep_gathered=keep_gathered),
    )
    engine = dual_engine(options.folder / "model", train, layout)
    generator = torch.Generator().manual_seed(layout.data_parallel.rank)

    def timed() -> float:
        window = [random_block(generator, options.vocabulary, BLOCK_LENGTH) for _ in range(options.accumulation)]
        layout.ranks.barrier()
        started = time.perf_counter()
        engine.train_step(window)
        return max(layout.ranks.gather_objects(time.perf_counter() - started))

    return timed


if __name__ == "__main__":
    main()
