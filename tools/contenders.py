"""Training steps to be timed against each other: dualtok's, the Hugging Face Trainer's, and a naive dual step.

Each is given the same blocks, batch, AdamW, clipping and precision, and reads its data within its own step. In bf16
dualtok holds bf16 weights and a float32 copy of them in the optimizer, the others float32 weights under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dualtok.commands.train import open_streams
from dualtok.data.manifest import load_manifest
from dualtok.data.mixed import load_sources
from dualtok.distributed.deepspeed_config import training_config
from dualtok.distributed.layout import build_layout
from dualtok.distributed.ranks import join_ranks
from dualtok.model.adapters import prepare_adapters
from dualtok.model.load import read_model_config
from dualtok.objective.head import IGNORED_LABEL
from dualtok.objective.loss import build_objective, dual_loss
from dualtok.reference.live import AdapterReference, LiveReference
from dualtok.train.engines.build import build_engine
from dualtok.train.live_reference import build_reference
from dualtok.train.loop import TrainingLoop

if TYPE_CHECKING:
    from dualtok.config.run import RunConfig
    from dualtok.config.train import TrainConfig
    from dualtok.data.stream.blocks import BlockStream

Step = Callable[[], None]
Batch = dict[str, torch.Tensor]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
        output_dir=f"{folder}/trainer",
        per_device_train_batch_size=train.batch_size,
        max_steps=steps,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        adam_epsilon=train.epsilon,
        max_grad_norm=train.gradient_clipping,
        lr_scheduler_type=train.schedule,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        bf16=train.precision == "bf16",
    )
    model = AutoModelForCausalLM.from_pretrained(start, attn_implementation="sdpa", dtype=torch.float32)
    return Trainer(model=model, args=arguments, train_dataset=blocks)


def training_loop(run: RunConfig) -> TrainingLoop:
    """Return the loop of a run, with the run's reference whatever its mode."""
    assert run.train is not None
    assert run.model is not None
    start = Path(str(run.model.path))
    layout = build_layout(join_ranks())
    load_manifest(run.data.dir)
    stream, validation = open_streams(run, load_sources(run.data, "train"), ("train", "validation"), layout.ranks)
    adapters = None
    if run.model.lora is not None:
        adapters = prepare_adapters(run.model.lora, read_model_config(start), seed=run.seed, base=str(start))
    reference: LiveReference | None = None
    if run.reference is not None and run.reference.mode in ("offload", "cpu", "resident"):
        reference = build_reference(run.reference, Path(run.reference.origin), layout)
    engine = build_engine(
        start,
        run.model,
        run.train,
        config=training_config(run.train, layout.ranks.world_size),
        objective=build_objective(run.loss, run.selection, run.goldfish),
        total_steps=10**6,
        layout=layout,
        adapters=adapters,
    )
    if run.reference is not None and run.reference.mode == "adapter":
        assert adapters is not None
        module: Any = engine.model
        put_in = adapters
        reference = AdapterReference(engine.token_losses, lambda: put_in.as_reference(module))
    return TrainingLoop(run, engine, stream, validation, 10**6, reference=reference)


def training_step(loop: TrainingLoop) -> Step:
    """Return a function that runs the loop's own step."""
    batches: Iterator[Batch] = loop.batches()

    def step() -> None:
        loop.step(batches)

    return step


def dualtok_step(run: RunConfig) -> Step:
    """Return a function that runs dualtok's own step of a run."""
    return training_step(training_loop(run))


def naive_dual_step(start: Path, reference: Path, stream: BlockStream, train: TrainConfig) -> Step:
    """Return a dual step as one would write it first, on Hugging Face models alone."""

    def load(folder: Path) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
        return model.to(DEVICE)

    model, frozen = load(start).train(), load(reference).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay, fused=True
    )
    drawn = batches_of(stream, train.batch_size)

    def precision() -> AbstractContextManager[object]:
        return torch.autocast(DEVICE.type, torch.bfloat16) if train.precision == "bf16" else nullcontext()

    def losses(causal_lm: Any, batch: Batch) -> torch.Tensor:
        logits = causal_lm(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        )

    def step() -> None:
        batch = {name: tensor.to(DEVICE) for name, tensor in next(drawn).items()}
        with precision():
            with torch.no_grad():
                reference_loss = losses(frozen, batch)
            outcome = dual_loss(losses(model, batch), reference_loss, batch["labels"].flatten() != IGNORED_LABEL)
        outcome.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        outcome.loss.item()

    return step
