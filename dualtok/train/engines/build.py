"""The engine that a run asks for."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any

from dualtok.distributed.deepspeed_config import offloads_optimizer, zero_stage
from dualtok.model.empty import tied_weights
from dualtok.model.load import DTYPES, read_model_config
from dualtok.model.loss_backends import load_backend
from dualtok.model.stages import build_stage, stage_names
from dualtok.monitor.timing import PhaseTimer
from dualtok.objective.selection import RankGather
from dualtok.train.engines.zero import build_zero_engine, quiet_deepspeed
from dualtok.train.optimizer import build_adamw, build_schedule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

    from dualtok.config.model import ModelConfig
    from dualtok.config.train import TrainConfig
    from dualtok.distributed.deepspeed_config import Json
    from dualtok.distributed.layout import Layout
    from dualtok.model.adapters import Adapters
    from dualtok.objective.loss import Objective
    from dualtok.train.engines.protocol import TrainingEngine

# Imported where they are used, for what they take to load: DeepSpeed (2 s).


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
        train: engine, optimizer, schedule, precision.
        config: complete DeepSpeed configuration (:func:`dualtok.distributed.deepspeed_config.training_config`).
        objective: the loss.
        total_steps: optimizer steps at which the schedule ends.
        layout: the job's ranks, in ``train.stages`` stages.
        adapters: train these and freeze the rest; None trains all weights.

    Raises:
        ConfigError: the model cannot be loaded, or not be cut into these stages.
    """
    build: Callable[..., TrainingEngine] = build_zero_engine if train.engine == "zero" else build_pipeline
    return build(
        folder,
        model,
        train,
        config=config,
        objective=objective,
        total_steps=total_steps,
        layout=layout,
        adapters=adapters,
    )


def build_pipeline(
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
    """Build this rank's stage of a model and wrap it, its AdamW and its schedule in a pipeline engine.

    Arguments as for :func:`build_engine`; the objective is called on the last stage with this replica's token losses.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    from dualtok.train.engines.pipeline import PipelineTrainer, StageEngine, StageModel, StagesModule

    quiet_deepspeed()
    pipeline = train.pipeline
    assert pipeline is not None
    engine_class, settle = StageEngine, None
    if train.engine == "sharded_pipeline":
        from dualtok.train.engines.sharded_pipeline import ShardedStageEngine, partitioner

        engine_class, settle = ShardedStageEngine, partitioner(config, layout)
    causal_lm, bounds = layout.ranks.together(
        lambda: build_stage(
            folder,
            read_model_config(folder),
            model,
            pipeline.balance,
            stage=layout.stage,
            stages=layout.stages,
            dtype=DTYPES[train.precision],
            device=layout.ranks.device,
            settle=settle,
        )
    )
    names = stage_names(causal_lm, bounds)
    if adapters is not None:
        adapters.put_into(causal_lm, lambda name: names.whole(name, layout.stage))
        if settle is not None:
            settle([parameter for parameter in causal_lm.parameters() if not hasattr(parameter, "ds_id")])
    replicas = layout.data_parallel
    gather = RankGather(replicas.gather, replicas.world_size) if replicas.world_size > 1 else None
    head: dict[str, Any] = {"memory_mib": train.loss_memory_mib}
    if layout.is_last_stage:
        head["kernel"] = load_backend(train.loss_backend, causal_lm, layout.ranks.device, train.precision)
    stage = StageModel(causal_lm, bounds[layout.stage], objective, gather, **head)
    module = StagesModule(stage, layout)
    if tied_weights(causal_lm) and adapters is None:  # frozen copies stay equal by themselves
        module.tie(_shared_weight(causal_lm, layout), layout)
    optimizer = build_adamw(module, train, on_host=offloads_optimizer(config), alone=zero_stage(config) == 0)
    with redirect_stdout(StringIO()):  # it prints the sizes of the stages
        engine = engine_class(
            args=None,
            model=module,
            optimizer=optimizer,
            lr_scheduler=build_schedule(train, total_steps),
            mpu=module.mpu(),
            config=config,
            config_class=DeepSpeedConfig(config, module.mpu()),
        )
    engine.timer = PhaseTimer(layout.ranks.device)
    return PipelineTrainer(engine, layout, names)


def _shared_weight(causal_lm: PreTrainedModel, layout: Layout) -> nn.Parameter | None:
    """Return this stage's copy of the weight that embeddings and head share; None on inner stages."""
    if layout.is_first_stage or layout.is_last_stage:
        holder: Any = causal_lm.get_input_embeddings() if layout.is_first_stage else causal_lm.get_output_embeddings()
        weight: nn.Parameter = holder.weight
        return weight
    return None
