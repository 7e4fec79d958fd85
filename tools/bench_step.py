"""What the dual loss costs: a training step with stored reference scores over a plain causal-LM step.

Both engines live in one process and step in turns on the same blocks, so that the ratio does not depend on the
machine's mood. The reference losses are read from the shards in the timed step, as in training.

    python tools/bench_step.py [--hidden 256] [--layers 4] [--block-length 256] [--batch-size 8] [--pairs 15]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmark_support import llama_config, paired, prepared_corpus, print_ratio, save_llama

from dualtok.data.manifest import load_manifest
from dualtok.engine.build import build_engine
from dualtok.engine.config import TrainConfig
from dualtok.engine.deepspeed_config import training_config
from dualtok.engine.distributed import join_ranks
from dualtok.engine.layout import build_layout
from dualtok.engine.loop import TrainingLoop
from dualtok.engine.train import open_streams
from dualtok.jobs.score import score
from dualtok.model.config import ModelConfig
from dualtok.monitor.events import EventWriter
from dualtok.objective.loss import build_objective
from dualtok.reference.config import ReferenceConfig
from dualtok.run import RunConfig


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 4), ("block-length", 256), ("batch-size", 8), ("pairs", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--deepspeed", default="ds_configs/zero0.json")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = prepared_corpus(Path(folder), options.block_length)
        vocabulary = load_manifest(data.dir).vocabulary
        config = llama_config(options.hidden, options.layers, options.block_length)
        reference = save_llama(Path(folder) / "reference", vocabulary, 1, config)
        start = save_llama(Path(folder) / "start", vocabulary, 2, config)
        settings = TrainConfig(learning_rate=1e-4, batch_size=options.batch_size, steps=10**6,
                               deepspeed=options.deepspeed, precision=options.precision)  # fmt: skip
        runs = {
            name: RunConfig(
                data=data,
                objective=name,
                output_dir=str(Path(folder) / name),
                train=settings,
                model=ModelConfig(path=str(start)),
                reference=ReferenceConfig(model=str(reference)) if name == "dual" else None,
            )
            for name in ("dual", "causal_lm")
        }
        score(runs["dual"])
        steps = [timed_step(run) for run in runs.values()]
        dual, plain = paired(*steps, repeats=options.pairs)
        print_ratio("dual step with stored scores / plain step", dual, plain, "s")


def timed_step(run: RunConfig) -> Callable[[], float]:
    """Return a function that runs the loop's own step and returns its seconds."""
    assert run.train is not None
    assert run.model is not None
    ranks = join_ranks()
    manifest = load_manifest(run.data.dir)
    stream, validation = open_streams(run, manifest, ("train", "validation"), ranks)
    engine = build_engine(
        str(run.model.path),
        run.model,
        run.train,
        config=training_config(run.train, ranks.world_size),
        objective=build_objective(run.objective, run.selection, run.goldfish),
        total_steps=10**6,
        layout=build_layout(ranks),
    )
    loop = TrainingLoop(run, engine, stream, validation, 10**6)
    batches: Iterator = loop.batches()
    events = EventWriter(None)

    def step() -> float:
        started = time.perf_counter()
        loop.step(batches, events)
        return time.perf_counter() - started

    return step


if __name__ == "__main__":
    main()
