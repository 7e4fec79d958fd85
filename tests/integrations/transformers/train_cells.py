"""Train several Trainers in one launch: ``torchrun ... -m tests.integrations.transformers.train_cells CELLS.json``.

Rank 0 writes each one's log and weights beside the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dualtok.distributed.ranks import leave_ranks
from dualtok.integrations.transformers import (
    DualCollator,
    DualConfig,
    DualTrainer,
    PrivacyCallback,
    dual_loss,
    with_token_losses,
)


def train_cell(cell: dict[str, Any], folder: Path) -> None:
    """Train one cell and write what it logged."""
    arguments = TrainingArguments(
        output_dir=str(folder / cell["name"]),
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **cell["arguments"],
    )
    blocks = load_from_disk(cell["blocks"])
    model = AutoModelForCausalLM.from_pretrained(cell["start"], dtype=torch.float32, attn_implementation="sdpa")
    if cell.get("lora"):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False))
    dual = DualConfig(**cell.get("dual", {}))
    evaluated = blocks.select(range(20))
    if cell["kind"] == "trainer":
        trainer: Trainer = DualTrainer(model, arguments, train_dataset=blocks, eval_dataset=evaluated, dual=dual)
    elif cell["kind"] == "function":
        model = with_token_losses(model, dual)
        trainer = Trainer(
            model,
            arguments,
            train_dataset=blocks,
            eval_dataset=evaluated,
            data_collator=DualCollator(),
            compute_loss_func=dual_loss(dual),
        )
    else:
        trainer = Trainer(model, arguments, data_collator=DualCollator(), eval_dataset=evaluated, train_dataset=blocks)
    if cell.get("privacy"):
        documents = load_from_disk(cell["privacy"])
        half = len(documents) // 2
        trainer.add_callback(
            PrivacyCallback(trainer, documents.select(range(half)), documents.select(range(half, len(documents))))
        )
    if cell["arguments"].get("max_steps", 1) > 0:
        trainer.train()
    if cell.get("evaluate"):
        trainer.evaluate()
    assert bool(arguments.deepspeed) == (type(trainer.model_wrapped).__name__ == "DeepSpeedEngine")
    trainer.save_model()
    if trainer.is_world_process_zero():
        (folder / f"{cell['name']}.json").write_text(json.dumps(trainer.state.log_history))


def main() -> None:
    """Train the cells of the file named on the command line, one after the other."""
    file = Path(sys.argv[1])
    for cell in json.loads(file.read_text()):
        train_cell(cell, file.parent)
    leave_ranks()


if __name__ == "__main__":
    main()
