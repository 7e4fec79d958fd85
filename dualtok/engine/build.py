"""The engine that a run asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.engine.config import TrainConfig
    from dualtok.engine.deepspeed_config import Json
    from dualtok.engine.layout import Layout
    from dualtok.engine.protocol import TrainingEngine
    from dualtok.model.adapters import Adapters
    from dualtok.model.config import ModelConfig
    from dualtok.objective.loss import Objective


def build_engine(
    folder: Path | str,
    model: ModelConfig,
    train: TrainConfig,
    *,
    config: Json,
    objective: Objective,
    total_steps: int,
    layout: Layout,
    adapters: Adapters | None = None,
) -> TrainingEngine:
    """Load a model and spread it, its AdamW and its schedule over the ranks as ``train.engine`` says.

    Args:
        folder: Hugging Face folder or hub name of the starting weights.
        model: attention and activation checkpointing.
        train: engine, optimiser, schedule, precision.
        config: complete DeepSpeed configuration (:func:`dualtok.engine.deepspeed_config.training_config`).
        objective: the loss.
        total_steps: optimiser steps at which the schedule ends.
        layout: the job's ranks, in ``train.stages`` stages.
        adapters: train these and freeze the rest; None trains all weights.

    Raises:
        ConfigError: the model cannot be loaded, or not be cut into these stages.
    """
    settings: dict[str, Any] = {"config": config, "objective": objective, "total_steps": total_steps, "layout": layout,
                "adapters": adapters}  # fmt: skip
    if train.engine == "zero":
        from dualtok.engine.zero import build_zero_engine

        return build_zero_engine(folder, model, train, **settings)
    from dualtok.engine.pipeline import build_pipeline_engine

    return build_pipeline_engine(folder, model, train, **settings)
