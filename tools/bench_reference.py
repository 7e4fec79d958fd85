"""What a reference on host cores costs: a step with ``reference.mode: cpu`` over one with stored scores.

Training is pinned to one core and the worker to another. Two training engines, equal but for where their reference
losses come from, take turns of several steps in one process. The worker gets nothing for free: each of its engine's
turns begins with an empty queue, so that the first forward pass is waited for inside the time that is measured, and the
turn ends when it has no work left. With the defaults the reference's forward pass takes about a quarter of a training
step; ``--reference-layers`` changes that.

    python tools/bench_reference.py [--hidden 192] [--layers 4] [--pairs 7] [--trace trace.json]

``--trace`` writes a timeline for chrome://tracing or Perfetto. ``overlap`` is the share of the worker's busy time in
which the model trained; waiting for reference losses does not count as training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark_support import llama_config, paired, prepared_corpus, print_ratio, save_llama

from dualtok.commands.score.run import score
from dualtok.commands.train import open_streams
from dualtok.config.model import ModelConfig
from dualtok.config.reference import ReferenceConfig
from dualtok.config.run import RunConfig
from dualtok.config.train import TrainConfig
from dualtok.data.manifest import load_manifest
from dualtok.data.mixed import load_sources
from dualtok.distributed.deepspeed_config import training_config
from dualtok.distributed.layout import build_layout
from dualtok.distributed.ranks import join_ranks
from dualtok.objective.loss import build_objective
from dualtok.reference.background import BackgroundReference, WorkerSettings
from dualtok.train.engines.build import build_engine
from dualtok.train.loop import TrainingLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dualtok.model.losses import Batch
    from dualtok.objective.token_weights import WeightedLoss

PASSAGES = 600
"""Enough for the steps that are timed; all of them are scored first."""
Spans = list[tuple[float, float]]


def main() -> None:
    """Measure, print and write the timeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 192), ("layers", 4), ("block-length", 256), ("batch-size", 8), ("pairs", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--reference-layers", type=int, default=2, help="of the training model's width")
    parser.add_argument("--steps", type=int, default=16, help="consecutive steps of a turn")
    parser.add_argument("--trace", type=Path, default=None)
    options = parser.parse_args()
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        parser.error("needs two cores, one for each side")
    os.sched_setaffinity(0, {allowed[0]})
    with tempfile.TemporaryDirectory() as folder:
        spans: dict[str, Spans] = {"step": [], "forward": []}
        stored, live, worker = _sides(Path(folder), options, allowed[1], spans)
        first, second = paired(live, stored, options.pairs)
        worker.close()
        print_ratio("step with reference.mode cpu / step with stored scores", first, second, "s")
        _print_overlap(spans)
        if options.trace is not None:
            options.trace.write_text(json.dumps(chrome_trace(spans)))
            print(f"timeline: {options.trace}")


def _sides(
    folder: Path, options: argparse.Namespace, core: int, spans: dict[str, Spans]
) -> tuple[Callable[[], float], Callable[[], float], BackgroundReference]:
    """Return the two steps to time, and the worker."""
    data = prepared_corpus(folder, options.block_length, PASSAGES)
    vocabulary = load_manifest(data.dir).vocabulary
    sizes = llama_config(options.hidden, options.layers, options.block_length)
    small = llama_config(options.hidden, options.reference_layers, options.block_length)
    reference = save_llama(folder / "reference", vocabulary, 1, small)
    start = save_llama(folder / "start", vocabulary, 2, sizes)
    settings = TrainConfig(
        learning_rate=1e-4,
        batch_size=options.batch_size,
        steps=10**6,
        precision="fp32",
        gradient_accumulation=options.accumulation,
    )
    run = RunConfig(
        data=data,
        objective="dual",
        output_dir=str(folder / "run"),
        train=settings,
        model=ModelConfig(path=str(start)),
        reference=ReferenceConfig(model=str(reference)),
    )
    score(run)
    rows = options.batch_size // options.accumulation
    worker = BackgroundReference(
        WorkerSettings(str(reference), "fp32", rows, threads=1, cores=(core,)),
        prefetch=2,
        on_forward=lambda began, ended: spans["forward"].append((began, ended)),
    )
    without = replace(run, reference=None)
    stored = timed_turn(run, None, [], options.steps)
    return stored, timed_turn(without, worker, spans["step"], options.steps), worker


def timed_turn(run: RunConfig, reference: BackgroundReference | None, spans: Spans, steps: int) -> Callable[[], float]:
    """Return a function that runs some of the loop's own steps and returns the mean seconds of one."""
    assert run.train is not None
    assert run.model is not None
    layout = build_layout(join_ranks())
    stream, validation = open_streams(run, load_sources(run.data, "train"), ("train", "validation"), layout.ranks)
    engine = build_engine(
        str(run.model.path),
        run.model,
        run.train,
        config=training_config(run.train, 1),
        objective=build_objective(run.loss, run.selection, run.goldfish),
        total_steps=10**6,
        layout=layout,
    )
    loop = TrainingLoop(run, engine, stream, validation, 10**6, reference=reference)
    train_step = engine.train_step

    def timed(window: Sequence[Batch]) -> list[WeightedLoss]:
        began = time.monotonic()
        outcomes = train_step(window)
        spans.append((began, time.monotonic()))
        return outcomes

    engine.train_step = timed  # type: ignore[method-assign]

    def turn() -> float:
        # Exactly the turn's batches: nothing is scored ahead for a later turn while the other engine works.
        batches: Iterator[Batch] = islice(loop.stream_batches(), steps * loop.train.gradient_accumulation)
        started = time.monotonic()
        if reference is not None:
            batches = reference.scored(batches, loop.train.gradient_accumulation)
        for _ in range(steps):
            loop.step(batches)
        return (time.monotonic() - started) / steps

    return turn


def _print_overlap(spans: dict[str, Spans]) -> None:
    busy = sum(ended - began for began, ended in spans["forward"])
    overlap = shared(spans["forward"], spans["step"]) / busy
    forward = statistics.median(ended - began for began, ended in spans["forward"])
    step = statistics.median(ended - began for began, ended in spans["step"])
    print(f"one forward pass of the worker: {forward:.4g} s, {forward / step:.2f} of a training step")
    print(f"overlap: {overlap:.3f} of the worker's {busy:.2f} s pass while the model trains")


def shared(inner: Spans, outer: Spans) -> float:
    """Return the time of ``inner`` spans that lies inside ``outer`` ones; the spans of each list are disjoint."""
    return sum(max(0.0, min(e, stop) - max(b, start)) for b, e in inner for start, stop in outer)


def chrome_trace(spans: dict[str, Spans]) -> dict[str, object]:
    """Return the timeline as Chrome's trace events: microseconds from the first one, one row per process."""
    origin = min(began for rows in spans.values() for began, _ in rows)
    names = {"step": "training step", "forward": "reference forward"}
    events = [
        {"name": names[kind], "ph": "X", "pid": 0, "tid": row, "ts": (began - origin) * 1e6, "dur": (end - began) * 1e6}
        for row, kind in enumerate(names)
        for began, end in spans[kind]
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


if __name__ == "__main__":
    main()
