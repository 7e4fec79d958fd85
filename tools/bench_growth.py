"""Resident memory of training ranks over many steps: what a rank holds must not grow with the steps it took.

Trains a small model with the dual loss (two ranks, ZeRO-3, stored reference losses, one data worker per rank,
evaluations, checkpoints, TensorBoard) and reads the ranks' resident memory while they run. The figure is what a rank
does not share with files: anonymous and shared memory (RssAnon + RssShmem), since mapped shards come and go with the
page cache.

    python tools/bench_growth.py [--steps 10000] [--ranks 2]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from benchmark_support import llama_config, prepared_corpus, rank_variables, save_llama, torchrun

BLOCK_LENGTH, PASSAGES = 64, 400
SECONDS = 0.5
"""Between two looks."""


def main() -> None:
    """Prepare, score, train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder), options.steps)
        finish(launcher(options.ranks, "score", run))
        seen = watch(launcher(options.ranks, "train", run), run.with_suffix("") / "metrics.jsonl")
    report(seen, options.steps)


def write_run(folder: Path, steps: int) -> Path:
    """Prepare a small corpus and a reference model, and return the run's YAML file."""
    data = prepared_corpus(folder, BLOCK_LENGTH, PASSAGES)
    config = llama_config(64, 2, BLOCK_LENGTH)
    save_llama(folder / "reference", 4096, 1, config)
    zero3 = folder / "zero3.json"
    zero3.write_text('{"zero_optimization": {"stage": 3}}')
    run: dict[str, Any] = {
        "data": {"dir": data.dir},
        "output_dir": str(folder / "run"),
        "objective": "dual",
        "model": {"config": config},
        "reference": {"model": str(folder / "reference")},
        "train": {
            "learning_rate": 1e-4,
            "batch_size": 8,
            "steps": steps,
            "precision": "fp32",
            "deepspeed": str(zero3),
            "evaluate_every": max(1, steps // 20),
            "evaluation_blocks": 16,
            "data_workers": 1,
        },
        "monitor": {"log_every": 10, "histogram_every": 100},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def launcher(ranks: int, verb: str, run: Path) -> subprocess.Popen[bytes]:
    """Start a verb under torchrun."""
    command = torchrun(ranks, "-m", "dualtok", verb, str(run))
    return subprocess.Popen(command, env=rank_variables(ranks), stdout=subprocess.DEVNULL)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a job that must succeed."""
    if process.wait():
        raise SystemExit(f"the job failed with status {process.returncode}")


def watch(job: subprocess.Popen[bytes], metrics: Path) -> list[tuple[int, list[int]]]:
    """Return (step, bytes of each process of a rank) over the time of a training job."""
    seen = []
    while job.poll() is None:
        time.sleep(SECONDS)
        try:
            ranks = [child for child in psutil.Process(job.pid).children() if "dualtok" in child.cmdline()]
            sizes = [own_bytes(process) for rank in ranks for process in (rank, *rank.children(recursive=True))]
        except (psutil.Error, FileNotFoundError, ProcessLookupError):
            continue
        if metrics.is_file() and all(sizes):  # a rank that is about to end has given its memory back
            step = sum(1 for _ in metrics.open("rb"))
            seen.append((step, sizes))
    finish(job)
    return seen


def own_bytes(process: psutil.Process) -> int:
    """Return a process's resident memory that no file backs."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) * 1024


def report(seen: list[tuple[int, list[int]]], steps: int) -> None:
    """Print memory over the steps, and its growth: the median of looks in the first and in the last percent."""
    window = max(2, steps // 100)

    def around(step: int) -> float:
        near = [sum(sizes) for at, sizes in seen if step < at <= step + window]
        return statistics.median(near) / 2**20 if near else float("nan")

    starts = [window, *range(steps // 10, steps, steps // 10), steps - window]
    print("steps  resident MiB of all ranks and their data workers (anonymous and shared)")
    for start in starts:
        print(f"{start:6,}  {around(start):8.1f}")
    print(f"growth from step {starts[0]:,} to {steps:,}: {around(starts[-1]) / around(starts[0]) - 1:+.2%}")


if __name__ == "__main__":
    main()
