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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark_support import llama_config, prepared_corpus, print_ratio, save_llama
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from dualtok.data.manifest import load_manifest
from dualtok.data.stream import BlockStream
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
from dualtok.objective.head import IGNORED_LABEL
from dualtok.objective.loss import build_objective, dual_loss
from dualtok.reference.config import ReferenceConfig
from dualtok.run import RunConfig

Step = Callable[[], None]
Batch = dict[str, torch.Tensor]
WARM_UP = 2
PASSAGES = 600
"""Enough for the steps; the reference scores all of them."""


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("vocabulary", 4096), ("hidden", 256), ("layers", 4), ("block-length", 256),
                          ("batch-size", 8), ("pairs", 15), ("loss-memory-mib", 256)):  # fmt: skip
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
            learning_rate=1e-4, batch_size=options.batch_size, steps=10**6, deepspeed=options.deepspeed,
            precision="fp32", loss_memory_mib=options.loss_memory_mib,
        )  # fmt: skip
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
        stream = BlockStream(data.dir, "train", seed=0)
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


def batches_of(stream: BlockStream, batch_size: int) -> Iterator[Batch]:
    """Return the batches of a stream for a job of one process."""
    return iter(stream.batches(start_sample=0, global_micro_batch=batch_size, rank=0, world_size=1, workers=0))


def hugging_face_trainer(start: Path, stream: BlockStream, train: TrainConfig, steps: int, folder: str) -> Trainer:
    """Return a Trainer for the same blocks; built before the ranks join, so that it sees a single process."""
    drawn = batches_of(stream, train.batch_size)
    blocks = []
    for _ in range(steps):
        batch = next(drawn)
        # The Trainer's model shifts the labels itself.
        unshifted = torch.full_like(batch["labels"], IGNORED_LABEL)
        unshifted[:, 1:] = batch["labels"][:, :-1]
        ids, positions = batch["input_ids"], batch["position_ids"]
        blocks += [
            {"input_ids": ids[row], "position_ids": positions[row], "labels": unshifted[row]} for row in range(len(ids))
        ]
    arguments = TrainingArguments(
        output_dir=f"{folder}/trainer", per_device_train_batch_size=train.batch_size, max_steps=steps,
        learning_rate=train.learning_rate, weight_decay=train.weight_decay, adam_beta1=train.betas[0],
        adam_beta2=train.betas[1], adam_epsilon=train.epsilon, max_grad_norm=train.gradient_clipping,
        lr_scheduler_type=train.schedule, report_to=[], save_strategy="no", logging_strategy="no", eval_strategy="no",
        disable_tqdm=True, use_cpu=not torch.cuda.is_available(), remove_unused_columns=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(start, attn_implementation="sdpa")
    return Trainer(model=model, args=arguments, train_dataset=blocks)


def dualtok_step(run: RunConfig) -> Step:
    """Return a function that runs the loop's own step."""
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
    batches: Iterator[Batch] = loop.batches()
    events = EventWriter(None)

    def step() -> None:
        loop.step(batches, events)

    return step


def naive_dual_step(start: Path, reference: Path, stream: BlockStream, train: TrainConfig) -> Step:
    """Return a dual step as one would write it first, on Hugging Face models alone."""
    model = AutoModelForCausalLM.from_pretrained(start, attn_implementation="sdpa").train()
    frozen = AutoModelForCausalLM.from_pretrained(reference, attn_implementation="sdpa").eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay, fused=True
    )
    drawn = batches_of(stream, train.batch_size)

    def losses(causal_lm: Any, batch: Batch) -> torch.Tensor:
        logits = causal_lm(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        )

    def step() -> None:
        batch = next(drawn)
        with torch.no_grad():
            reference_loss = losses(frozen, batch)
        outcome = dual_loss(losses(model, batch), reference_loss, batch["labels"].flatten() != IGNORED_LABEL)
        outcome.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        outcome.loss.item()

    return step


if __name__ == "__main__":
    main()
