"""What the dual loss costs in the Trainer of transformers: DualTrainer's step against the plain Trainer's, in turns.

Both are real ``train()`` calls on the same tokens, model, AdamW, clipping and precision (fp32), in one process. A step
is timed from the end of the one before to its own, data included; processor seconds do not depend on what else runs.
Reference losses are stored in the dataset; here they are drawn at random, which changes which tokens are selected and
not how many. Peak memory is measured in a process of each.

    python tools/bench_trainer.py [--vocabulary 32000] [--hidden 256] [--layers 4] [--length 256] [--batch-size 8]
                                  [--pairs 11]
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from benchmark_support import llama_config, paired, print_ratio
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from dualtok.integrations.transformers import DualCollator, DualTrainer

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = {"dual": DualTrainer, "plain": Trainer}
STEPS = 3
"""Optimizer steps of one turn; the first one, which begins with the making of a data loader, is not timed."""


class Clock(TrainerCallback):
    """Times each step from the end of the one before."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the time and the processor's."""
        self.ends.append((time.perf_counter(), time.process_time()))


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"vocabulary": 32000, "hidden": 256, "layers": 4, "length": 256, "batch-size": 8, "pairs": 11}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.memory_of:
            turn(options.memory_of, options, folder, [])()
            status = Path("/proc/self/status").read_text(
                encoding="utf-8"
            )  # getrusage also counts what started this one
            print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10)  # type: ignore[index]
            return
        processor: dict[str, list[float]] = {kind: [] for kind in KINDS}
        turns = [turn(kind, options, folder, seconds) for kind, seconds in processor.items()]
        print(f"vocabulary {options.vocabulary}, {options.batch_size} rows of {options.length} tokens")
        print_ratio("DualTrainer's step with stored scores / Trainer's step", *paired(*turns, options.pairs), "s")
        print_ratio("the same, processor seconds", processor["dual"][1:], processor["plain"][1:], "s")
    peaks = {kind: [peak(kind) for _ in range(3)] for kind in KINDS}
    print_ratio("peak resident memory of the process, DualTrainer / Trainer", peaks["dual"], peaks["plain"], "MiB")


def turn(kind: str, options: argparse.Namespace, folder: str, processor: list[float]) -> Callable[[], float]:
    """Return a function that trains some steps, returns the seconds of one and appends its processor seconds."""
    torch.manual_seed(0)
    settings = llama_config(options.hidden, options.layers, options.length)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **settings, vocab_size=options.vocabulary)
    )
    rows = options.batch_size * STEPS
    tokens = torch.randint(0, options.vocabulary, (rows, options.length)).tolist()
    reference = (torch.randn(rows, options.length) + torch.tensor(options.vocabulary).log()).tolist()
    data = Dataset.from_dict({"input_ids": tokens, **({"reference_loss": reference} if kind == "dual" else {})})
    arguments = TrainingArguments(
        output_dir=f"{folder}/{kind}",
        per_device_train_batch_size=options.batch_size,
        max_steps=STEPS,
        learning_rate=1e-4,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    clock = Clock()
    trainer = KINDS[kind](model, arguments, DualCollator(), train_dataset=data, callbacks=[clock])

    def run() -> float:
        gc.collect()
        clock.ends.clear()
        trainer.train()
        steps = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(clock.ends, clock.ends[1:], strict=False)]
        wall, busy = (statistics.mean(seconds) for seconds in zip(*steps, strict=True))
        processor.append(busy)
        return wall

    return run


def peak(kind: str) -> float:
    """Return the peak resident memory of a process that trains one kind, MiB."""
    command = [sys.executable, *sys.argv, "--memory-of", kind]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(ended.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
