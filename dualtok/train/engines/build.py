"""The engine that a run asks for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dualtok.train.engines.base import Blueprint

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.config.model import ModelConfig
    from dualtok.config.train import TrainConfig
    from dualtok.distributed.deepspeed_config import Json
    from dualtok.distributed.layout import Layout
    from dualtok.model.adapters import Adapters
    from dualtok.objective.loss import Objective
    from dualtok.train.engines.base import TrainingEngine
    from dualtok.train.engines.dp_account import PrivacyAccount

ENGINES = {"zero": "zero", "pipeline": "pipeline", "sharded_pipeline": "sharded_pipeline", "opacus": "dp_sgd"}
"""Module of each ``train.engine``; its ``build`` makes one of a :class:`Blueprint`. Only the one that a run asks for
is imported: the others load DeepSpeed's pipelines or Opacus for nothing."""


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
    account: PrivacyAccount | None = None,
    seed: int = 0,
) -> TrainingEngine:
    """Load a model and spread it, its AdamW and its schedule over the ranks as ``train.engine`` says.

    Args:
        folder: Hugging Face folder or hub name of the starting weights.
        model: attention and activation checkpointing.
        train: engine, optimizer, schedule, precision.
        config: complete DeepSpeed configuration (:func:`dualtok.distributed.deepspeed_config.training_config`); empty
            for the engine ``opacus``.
        objective: the loss; called where the head is, with this replica's token losses.
        total_steps: optimizer steps at which the schedule ends.
        layout: the job's ranks, in ``train.stages`` stages.
        adapters: train these and freeze the rest; None trains all weights.
        account: noise and clipping, for the engine ``opacus``.
        seed: of the noise of ``opacus``, unless it is secret.

    Raises:
        ConfigError: the model cannot be loaded, or not be cut into these stages; a package is not installed.
    """
    blueprint = Blueprint(
        folder, model, train, config, objective, total_steps, layout, adapters=adapters, account=account, seed=seed
    )
    engine: TrainingEngine = import_module(f"dualtok.train.engines.{ENGINES[train.engine]}").build(blueprint)
    return engine
