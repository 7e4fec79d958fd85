"""How fast the stream reads: beside MosaicML's StreamingDataset and `datasets`, beside the demo's training, and what
a seek and ten thousand micro-batches cost.

* readers: tokens/s of each reader from the same blocks to the same model inputs, in turns, with 2 data workers and 0;
* training: tokens/s that the stream gives, with 2 workers, and that the demo's model trains on (one rank, in turns);
* seek: time to the first micro-batch at sample 10 and at sample 10,000,000 of a split of more than 10 million blocks,
  each with a fresh stream;
* memory: what the reader and its workers hold of their own (RssAnon and RssShmem) after the first, the 1,000th and the
  10,000th micro-batch. Pages of the mapped shards are not counted: they are the system's cache, which takes them back.

All files are in the system's cache. Tokens are those of whole blocks, padding included. MosaicML's reader is installed
into a folder of its own, because it needs older libraries than dualtok:

    pip install --no-deps --target build/mosaicml --requirement requirements-bench.txt
    python tools/bench_stream.py [--parts readers training seek memory] [--readers mosaicml datasets]
        [--blocks 131072] [--block-length 1024] [--batch-size 8] [--seconds 3] [--warm-up 1] [--pairs 7]

Needs about 2 GB of disk under --folder (default: the temporary directory).
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from benchmark_support import prepared_corpus, print_ratio, save_llama
from stream_formats import (
    Batch,
    link_blocks,
    open_datasets,
    open_dualtok,
    open_mosaicml,
    write_arrow,
    write_blocks,
    write_mds,
)

from dualtok.data.folder import DataFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PARTS = ("readers", "training", "seek", "memory")
OTHERS = {"mosaicml": (write_mds, open_mosaicml), "datasets": (write_arrow, open_datasets)}
NEAR = 10
MIB = 2**20


def main() -> None:
    """Measure and print the ratios."""
    options = parse_options()
    torch.set_num_threads(1)
    sys.path.append(str(options.mosaicml))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        prepared = write_blocks(folder / "dualtok", options.blocks, options.block_length)
        # Readers first: training joins a process group, which MosaicML's reader would ask for ranks.
        measurements = {
            "readers": compare_readers,
            "seek": compare_seeks,
            "memory": measure_memory,
            "training": compare_training,
        }
        for part, measure in measurements.items():
            if part in options.parts:
                measure(folder, prepared, options)


def parse_options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--readers", nargs="+", choices=tuple(OTHERS), default=list(OTHERS))
    for name, default in (
        ("blocks", 131072),
        ("block-length", 1024),
        ("batch-size", 8),
        ("pairs", 7),
        ("seeks", 15),
        ("far-sample", 10**7),
        ("batches", 10_000),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn")
    parser.add_argument("--warm-up", type=float, default=1.0, help="what is read before it, in seconds")
    parser.add_argument("--mosaicml", type=Path, default=Path("build/mosaicml"), help="where its reader is installed")
    parser.add_argument("--folder", type=Path, help="where the blocks are written")
    return parser.parse_args()


def compare_readers(folder: Path, prepared: Path, options: argparse.Namespace) -> None:
    """Print tokens/s of all readers and dualtok's ratio to each."""
    small = write_blocks(folder / "small", 512, options.block_length)
    batches = 512 // options.batch_size
    seen = {"dualtok": blocks_of(open_dualtok(small, options.batch_size, 2), batches)}
    for name in options.readers:
        write, reader = OTHERS[name]
        write(prepared, folder / name)
        write(small, folder / f"small-{name}")
        seen[name] = blocks_of(reader(folder / f"small-{name}", options.batch_size, 2), batches)
        assert seen[name] == seen["dualtok"], f"{name} reads other blocks"
    print(
        f"{options.blocks} blocks of {options.block_length}, micro-batches of {options.batch_size}; an epoch of 512 "
        f"blocks is the same from {' and '.join(seen)}"
    )
    for workers in (2, 0):
        streams = {"dualtok": open_dualtok(prepared, options.batch_size, workers)}
        for name in options.readers:
            # MosaicML refuses a folder that it has open already.
            (copy := folder / f"{name}-{workers}").symlink_to(folder / name)
            streams[name] = OTHERS[name][1](copy, options.batch_size, workers)
        rates = in_turns({name: rate_of(stream, options) for name, stream in streams.items()}, options.pairs)
        for name in options.readers:
            print_ratio(f"{workers} workers, dualtok / {name}", rates["dualtok"], rates[name], "tokens/s")
        del streams
        gc.collect()


def blocks_of(stream: Iterator[Batch], batches: int) -> Counter[bytes]:
    """Return the contents of so many micro-batches, in whatever order."""
    names = ("input_ids", "position_ids", "labels")
    return Counter(
        b"".join(batch[name][row].numpy().tobytes() for name in names)
        for batch in islice(stream, batches)
        for row in range(len(batch["input_ids"]))
    )


def compare_training(folder: Path, _: Path, options: argparse.Namespace) -> None:
    """Print tokens/s of the stream, with the demo's blocks and micro-batches, and of the demo's training."""
    from contenders import dualtok_step

    from dualtok.commands.demo import write_runs
    from dualtok.config.load import parse_run
    from dualtok.data.manifest import load_manifest

    settings = write_runs(folder / "demo")["base"]
    width, batch_size = settings["data"]["block_length"], settings["train"]["batch_size"]
    data = prepared_corpus(folder / "sotu", width, passages=600)
    stream = open_dualtok(Path(data.dir), batch_size, 2)
    start = save_llama(folder / "start", load_manifest(data.dir).vocabulary, 0, settings["model"]["config"])
    settings["data"] = {"dir": data.dir, "source": data.source, "block_length": width, "lanes": data.lanes}
    settings["model"] = {"path": str(start)}
    del settings["workflow"]
    step = dualtok_step(parse_run(settings, source="demo.yaml: base"))

    def train() -> int:
        step()
        return batch_size * width

    turns = {"stream": rate_of(stream, options), "training": lambda: rate(train, options.warm_up, options.seconds)}
    rates = in_turns(turns, options.pairs)
    print_ratio("demo, 2 workers, stream / training on one rank", rates["stream"], rates["training"], "tokens/s")


def compare_seeks(folder: Path, prepared: Path, options: argparse.Namespace) -> None:
    """Print the time to the first micro-batch near the beginning and far from it."""
    linked = link_blocks(prepared, folder / "linked", options.far_sample + options.batch_size)
    for workers in (0, 2):
        seconds = in_turns(
            {
                "near": lambda workers=workers: first_batch(linked, NEAR, workers, options.batch_size),
                "far": lambda workers=workers: first_batch(linked, options.far_sample, workers, options.batch_size),
            },
            options.seeks,
        )
        label = f"{workers} workers, first micro-batch at sample {options.far_sample:,} / {NEAR}"
        print_ratio(label, seconds["far"], seconds["near"], "s")


def first_batch(prepared: Path, sample: int, workers: int, batch_size: int) -> float:
    """Return the seconds from a fresh stream to its first micro-batch."""

    stream = DataFolder(prepared).open("train", seed=0, verify=False)
    gc.collect()
    started = time.perf_counter()
    batches = stream.batches(sample, batch_size, workers=workers)
    next(batches)
    return time.perf_counter() - started


def measure_memory(_: Path, prepared: Path, options: argparse.Namespace) -> None:
    """Print what the reader's processes hold in the course of many micro-batches."""
    points = (1, max(1, options.batches // 10), options.batches)
    for workers in (0, 2):
        # A fresh process: what the other parts left behind would make the growth look small.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            held = pool.submit(memory_at, prepared, options.batch_size, workers, points).result()
        told = ", ".join(f"{size:.1f} MiB after {point:,}" for point, size in zip(points, held, strict=True))
        print(f"{workers} workers, memory of the reader and its workers: {told}; last / second {held[2] / held[1]:.4f}")


def memory_at(prepared: Path, batch_size: int, workers: int, points: tuple[int, ...]) -> list[float]:
    """Return the memory in MiB after so many micro-batches each."""
    stream = open_dualtok(prepared, batch_size, workers)
    held, done = [], 0
    for point in points:
        for _ in islice(stream, point - done):
            pass
        done = point
        held.append(own_memory() / MIB)
    return held


def own_memory() -> int:
    """Return the bytes of this process and its children that are neither a file's pages nor shared libraries."""
    total = 0
    for process in ("self", *(child.pid for child in multiprocessing.active_children())):
        for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) * 1024
    return total


def rate_of(stream: Iterator[Batch], options: argparse.Namespace) -> Callable[[], float]:
    """Return a function that measures a stream for one turn."""

    def read() -> int:
        return next(stream)["input_ids"].numel()

    return lambda: rate(read, options.warm_up, options.seconds)


def rate(work: Callable[[], int], warm_up: float, seconds: float) -> float:
    """Return the tokens/s of work that returns its tokens; what lay ready before is used up in the warm-up."""
    for duration in (warm_up, seconds):
        tokens, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < duration or not tokens:
            tokens += work()
    return tokens / passed


def in_turns(measurements: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run measurements in turns, each ``repeats`` times after one that is not counted, each first in its turn."""
    names = list(measurements)
    results: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-1, repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            result = measurements[name]()
            if repeat >= 0:
                results[name].append(result)
    return results


if __name__ == "__main__":
    main()
