"""Processor time of the quickstart: `dualtok init` and `dualtok run`, against the single commands that they stand for.

Both do the same work: 250 passages, a small new model, 40 steps of each of four training runs, and the audit; the
settings are in this file. The single commands are twelve, as the quickstart had them before `dualtok run`; with
``--ranks 2`` both train the dual model on two ranks under ZeRO-3 (torchrun), else all in one process each. They take
turns, in new folders. The time until the first line of `dualtok run` is wall time.

    python tools/bench_quickstart.py [--pairs 3] [--ranks 1] [--first-lines 7]
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import yaml
from benchmark_support import print_ratio

from dualtok.data.sources.corpora import sotu_passages, write_jsonl

SHARED = """
data:
  dir: data
  source: corpus.jsonl
  block_length: 128
  lanes: 8
  vocab_size: 1024
  shares: {train: 0.6, reference: 0.12, attack_reference: 0.12, validation: 0.06, held_out: 0.1}
model:
  config: {model_type: llama, hidden_size: 64, intermediate_size: 192, num_hidden_layers: 2, num_attention_heads: 4,
           max_position_embeddings: 128, tie_word_embeddings: true}
train: {precision: fp32, learning_rate: 3.0e-3, batch_size: 8, steps: 40, evaluate_every: 20}
"""
ONE_BY_ONE = """
output_dir: runs/dual
objective: dual
reference: {model: models/reference}
audit:
  models: {reference alone: models/reference, plain: models/plain, dual: models/dual}
  attack_reference: models/attack_reference
  runs: {plain: runs/plain, dual: runs/dual}
  fpr_targets: [0.1]
"""
AT_ONCE = """
output_dir: runs/dual
objective: dual
workflow: {plain: true}
audit: {fpr_targets: [0.1]}
"""
PLAIN = "objective=causal_lm reference=null"
COMMANDS = f"""
dualtok prepare run.yaml
dualtok train run.yaml {PLAIN} train.split=reference output_dir=runs/reference
dualtok export runs/reference models/reference
dualtok train run.yaml {PLAIN} train.split=attack_reference output_dir=runs/attack_reference
dualtok export runs/attack_reference models/attack_reference
dualtok score run.yaml
START train run.yaml train.deepspeed=ZERO
dualtok export runs/dual models/dual
dualtok train run.yaml objective=causal_lm output_dir=runs/plain
dualtok export runs/plain models/plain
dualtok audit run.yaml output_dir=runs/audit
dualtok report run.yaml output_dir=runs/audit
"""


def main() -> None:
    """Measure in turns and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1, help="of the dual model's training")
    parser.add_argument("--first-lines", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus.jsonl"
        write_jsonl(islice(sotu_passages(), 250), corpus)
        new, old = [], []
        for pair in range(options.pairs):  # without a warm-up: these are minutes, and processor time
            both = [(new, at_once), (old, one_by_one)]
            for results, way in both if pair % 2 == 0 else reversed(both):
                results.append(way(corpus, options.ranks))
        print_ratio("quickstart, processor time: init and run / twelve commands", new, old, "s")
        waits = [first_line(corpus) for _ in range(options.first_lines)]
        print(f"first line of `dualtok run`: {statistics.median(waits):.2f} s ({min(waits):.2f} to {max(waits):.2f})")


def one_by_one(corpus: Path, ranks: int) -> float:
    """Give the single commands; returns their processor time, s."""
    start = f"torchrun --nproc-per-node {ranks} -m dualtok" if ranks > 1 else "dualtok"
    script = COMMANDS.replace("START", start).replace("ZERO", "zero3.json" if ranks > 1 else "null")
    with tempfile.TemporaryDirectory() as name:
        folder = made(Path(name), corpus, SHARED + ONE_BY_ONE)
        return sum(seconds(shlex.split(line), folder) for line in script.strip().splitlines())


def at_once(corpus: Path, ranks: int) -> float:
    """Start `dualtok init`, then `dualtok run` on the same settings as the single commands; returns both's time, s."""
    with tempfile.TemporaryDirectory() as name:
        folder = made(Path(name), corpus, SHARED + AT_ONCE)
        asked = seconds(["dualtok", "init", "--data", "corpus.jsonl", "--gpus", "0", "--out", "other.yaml"], folder)
        overrides = []
        if ranks > 1:
            overrides = ["workflow.launcher=torchrun", f"workflow.ranks={ranks}", "train.deepspeed=zero3.json"]
        return asked + seconds(["dualtok", "run", "run.yaml", *overrides], folder)


def first_line(corpus: Path) -> float:
    """Return the wall time until `dualtok run` prints its first line, s."""
    with tempfile.TemporaryDirectory() as name:
        folder = made(Path(name), corpus, SHARED + AT_ONCE)
        started = time.perf_counter()
        with subprocess.Popen(
            program(["dualtok", "run", "run.yaml"]), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            waited = time.perf_counter() - started
            process.terminate()
        return waited


def made(folder: Path, corpus: Path, settings: str) -> Path:
    """Return a folder with the corpus and a run file."""
    yaml.safe_load(settings)
    (folder / "corpus.jsonl").symlink_to(corpus)
    (folder / "run.yaml").write_text(settings, encoding="utf-8")
    (folder / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    return folder


def program(words: list[str]) -> list[str]:
    """Return a command of this interpreter's own programs."""
    modules = {"dualtok": "dualtok", "torchrun": "torch.distributed.run"}
    return [sys.executable, "-m", modules[words[0]], *words[1:]]


def seconds(words: list[str], folder: Path) -> float:
    """Run a command and return the processor time of all its processes, s."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            program(words), cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables()
        )
        _, ended, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(ended)
    if process.returncode:
        raise SystemExit(f"{shlex.join(words)} ended with status {process.returncode}:\n{(folder / 'log').read_text()}")
    return used.ru_utime + used.ru_stime


def variables() -> dict[str, str]:
    """Return the environment of all commands."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_SIZE": os.environ.get("LOCAL_SIZE", "2")}


if __name__ == "__main__":
    main()
