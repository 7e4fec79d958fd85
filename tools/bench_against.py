"""Processor time of this checkout against another one's, each with its own environment: of preparation and of a start.

    git worktree add ../before COMMIT && make -C ../before install
    python tools/bench_against.py ../before [--megabytes 100] [--pairs 3] [--only prepare start]

``prepare`` makes shards of synthetic text (tools/bench_prepare.py) with one process; ``start`` trains a Llama of 22
layers, that lies in a folder, for one step. The two take turns, and who is first changes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import yaml
from bench_prepare import texts
from benchmark_support import llama_config, paired, print_ratio, save_llama

from dualtok.data.sources.corpora import sotu_passages, write_jsonl

HERE = Path(__file__).resolve().parent.parent
BLOCK_LENGTH = 128


def main() -> None:
    """Measure in turns and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout with its environment in .venv")
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=("prepare", "start"), default=["prepare", "start"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        other = options.other.resolve()
        runs = {
            "prepare": lambda: write_prepare(folder, options.megabytes),
            "start": lambda: write_start(folder, other),
        }
        for verb in options.only:
            arguments, leaves = runs[verb]()

            def run(checkout: Path, arguments: list[str] = arguments, leaves: Path = leaves) -> float:
                shutil.rmtree(leaves, ignore_errors=True)
                return seconds(checkout, arguments)

            mine, theirs = paired(lambda: run(HERE), lambda: run(other), options.pairs)
            print_ratio(f"{verb}: processor time, this / other", mine, theirs, "s")


def write_prepare(folder: Path, megabytes: float) -> tuple[list[str], Path]:
    """Write a corpus and a run file; returns the command and what it leaves."""
    source = folder / "texts.jsonl"
    write_jsonl(texts(megabytes, seed=0), source)
    data = {"dir": str(folder / "prepared"), "source": str(source)}
    (folder / "prepare.yaml").write_text(yaml.safe_dump({"data": data}), encoding="utf-8")
    return ["prepare", str(folder / "prepare.yaml")], folder / "prepared"


def write_start(folder: Path, other: Path) -> tuple[list[str], Path]:
    """Write a model and a run of one step; the data are the other's, which may not read what this version prepares."""
    source = write_jsonl(islice(sotu_passages(), 200), folder / "sotu.jsonl")
    data = {"dir": str(folder / "blocks"), "source": str(source), "block_length": BLOCK_LENGTH, "lanes": 16}
    model = save_llama(folder / "model", 4096, 0, llama_config(256, 22, BLOCK_LENGTH))
    train = {"learning_rate": 1e-3, "batch_size": 2, "steps": 1, "precision": "fp32", "evaluation_blocks": 1}
    run = {
        "data": data,
        "objective": "causal_lm",
        "model": {"path": str(model)},
        "output_dir": str(folder / "run"),
        "train": train,
    }
    (folder / "start.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    seconds(other, ["prepare", str(folder / "start.yaml")])
    return ["train", str(folder / "start.yaml")], folder / "run"


def seconds(checkout: Path, arguments: list[str]) -> float:
    """Run a verb of a checkout and return the processor time of all its processes, s."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(checkout / ".torch_extensions"),
        "PATH": f"{checkout / '.venv' / 'bin'}:{os.environ['PATH']}",
    }
    command = [str(checkout / ".venv" / "bin" / "python"), "-m", "dualtok", *arguments]
    process = subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
