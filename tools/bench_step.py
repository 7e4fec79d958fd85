"""What the dual loss costs: dualtok's step with stored reference scores, timed in turns with three others.

* the plain fine-tuning step of the Hugging Face Trainer: a real ``Trainer.train()``, from one step's end to the next;
* a naive dual step: Hugging Face model and reference side by side, full logits of both, no stored scores;
* dualtok's own plain causal-LM step.

Same model, blocks per batch, AdamW, clipping and precision (fp32); data are read within the timed step wherever the
contender reads them. All live in one process and take turns after each Trainer step, so that the ratios do not depend
on the machine's mood.

    python tools/bench_step.py [--vocabulary 4096] [--hidden 256] [--layers 4] [--block-length 256] [--batch-size 8]
                               [--pairs 15] [--loss-memory-mib 256]

The model's vocabulary may be larger than that of the blocks' tokenizer: its weights are random anyway.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark_support import llama_config, prepared_corpus, print_ratio, save_llama
from contenders import Step, dualtok_step, hugging_face_trainer, naive_dual_step
from transformers import TrainerCallback

from dualtok.commands.score.run import score
from dualtok.config.model import ModelConfig
from dualtok.config.reference import ReferenceConfig
from dualtok.config.run import RunConfig
from dualtok.config.train import TrainConfig
from dualtok.data.folder import DataFolder
from dualtok.data.manifest import load_manifest

WARM_UP = 2
PASSAGES = 600
"""Enough for the steps; the reference scores all of them."""


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("vocabulary", 4096),
        ("hidden", 256),
        ("layers", 4),
        ("block-length", 256),
        ("batch-size", 8),
        ("pairs", 15),
        ("loss-memory-mib", 256),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--deepspeed", default="ds_configs/zero0.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = prepared_corpus(Path(folder), options.block_length, passages=PASSAGES)
        vocabulary = max(options.vocabulary, load_manifest(data.dir).vocabulary)
        config = llama_config(options.hidden, options.layers, options.block_length)
        reference = save_llama(Path(folder) / "reference", vocabulary, 1, config)
        start = save_llama(Path(folder) / "start", vocabulary, 2, config)
        settings = TrainConfig(
            learning_rate=1e-4,
            batch_size=options.batch_size,
            steps=10**6,
            deepspeed=options.deepspeed,
            precision="fp32",
            loss_memory_mib=options.loss_memory_mib,
        )
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
        stream = DataFolder(data.dir).open("train")
        trainer = hugging_face_trainer(start, stream, settings, options.pairs + WARM_UP, folder)
        contenders = {
            "dual": dualtok_step(runs["dual"]),
            "plain": dualtok_step(runs["causal_lm"]),
            "naive": naive_dual_step(start, reference, stream, settings),
        }
        turns = Turns(contenders)
        trainer.add_callback(turns)
        trainer.train()
        seconds = {name: times[WARM_UP:] for name, times in turns.seconds.items()}
        print(f"vocabulary {vocabulary}, {options.batch_size} blocks of {options.block_length}")
        print_ratio(
            "dual step with stored scores / Hugging Face Trainer step", seconds["dual"], seconds["trainer"], "s"
        )
        print_ratio("dual step with stored scores / naive two-forward step", seconds["dual"], seconds["naive"], "s")
        print_ratio("dual step with stored scores / dualtok's plain step", seconds["dual"], seconds["plain"], "s")


class Turns(TrainerCallback):
    """Times each of the Trainer's steps, and lets every other contender take one step after it."""

    def __init__(self, contenders: dict[str, Step]) -> None:
        self._contenders = contenders
        self.seconds: dict[str, list[float]] = {name: [] for name in ("trainer", *contenders)}
        self._resumed = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Start the clock of the first step."""
        assert type(model).__name__ == "LlamaForCausalLM", "the Trainer has wrapped its model"
        self._resumed = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the Trainer's time since the last turn, then run the others, each first in turn."""
        self.seconds["trainer"].append(time.perf_counter() - self._resumed)
        names = list(self._contenders)
        first = state.global_step % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            started = time.perf_counter()
            self._contenders[name]()
            self.seconds[name].append(time.perf_counter() - started)
        gc.collect()
        self._resumed = time.perf_counter()


if __name__ == "__main__":
    main()
