"""What the benchmarks on several ranks share: a model and the engine that trains it, blocks, resident memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from benchmark_support import llama_config
from transformers import AutoConfig, PretrainedConfig

from dualtok.config.model import ModelConfig
from dualtok.distributed.deepspeed_config import training_config
from dualtok.objective.loss import build_objective
from dualtok.train.engines.build import build_engine

if TYPE_CHECKING:
    from dualtok.config.train import TrainConfig
    from dualtok.distributed.layout import Layout
    from dualtok.train.engines.base import TrainingEngine


def untied_llama(hidden: int, layers: int, vocabulary: int, block_length: int) -> PretrainedConfig:
    """Return the configuration of a Llama whose output layer has weights of its own."""
    shape = llama_config(hidden, layers, block_length) | {"vocab_size": vocabulary, "tie_word_embeddings": False}
    config: PretrainedConfig = AutoConfig.for_model(**shape)
    return config


def dual_engine(model: Path, train: TrainConfig, layout: Layout) -> TrainingEngine:
    """Build the engine that trains a model with the dual loss, under a schedule that does not end."""
    return build_engine(
        model,
        ModelConfig(path=str(model)),
        train,
        config=training_config(train, layout.data_parallel.world_size),
        objective=build_objective("dual"),
        total_steps=10**6,
        layout=layout,
    )


def random_block(generator: torch.Generator, vocabulary: int, length: int) -> dict[str, torch.Tensor]:
    """Return one random block with random reference losses."""
    ids = torch.randint(0, vocabulary, (1, length + 1), generator=generator)
    return {
        "input_ids": ids[:, :-1],
        "labels": ids[:, 1:],
        "position_ids": torch.arange(length)[None],
        "reference_loss": torch.rand(1, length, generator=generator) * 20,
    }


def resident(field: str) -> int:
    """Return a field of this process's status in bytes: ``VmRSS`` now, ``VmHWM`` at its peak."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
