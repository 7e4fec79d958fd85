"""From a run's settings to what ``dualtok.plan`` computes with: the model's shape, the job, and the data's size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dualtok.commands.plan.shapes import reference_shape, shapes_of
from dualtok.config.data import is_address
from dualtok.data.manifest import MANIFEST, load_manifest, split_entry
from dualtok.data.remote.remote import location_of
from dualtok.distributed.deepspeed_config import training_config, zero_stage
from dualtok.errors import ConfigError
from dualtok.model.stage_bounds import cut
from dualtok.objective.settings import ACCELERATOR_LOSS_MEMORY_MIB
from dualtok.plan.memory import Job

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualtok.config.data import DataConfig
    from dualtok.config.model import ModelConfig
    from dualtok.config.run import RunConfig
    from dualtok.config.train import TrainConfig
    from dualtok.data.manifest import Manifest
    from dualtok.distributed.deepspeed_config import Json
    from dualtok.objective.settings import SelectionConfig
    from dualtok.plan.shape import ModelShape

NEW_TOKENIZER = 4096
"""Ids of a tokenizer that ``dualtok prepare`` will train, unless ``data.vocab_size`` says otherwise."""
AUXILIARY = ("reference", "auxiliary")
"""Splits that references learn."""
SETTINGS = {
    "reduce_bucket": "reduce_bucket_size",
    "sub_group": "sub_group_size",
    "prefetch": "stage3_prefetch_bucket_size",
    "max_reuse": "stage3_max_reuse_distance",
}
"""Field of :class:`Job` -> DeepSpeed's name, both in elements."""


@dataclass(frozen=True)
class Material:
    """What a run works on."""

    shape: ModelShape
    """Of the model in training, with its adapters."""
    reference: ModelShape
    """Of the reference model; the model's own shape where none is named."""
    length: int
    """Tokens per block."""
    blocks: int | None
    """Blocks of the split to learn; None where the data is not prepared."""
    documents: int | None = None
    """Documents of the split to learn; None where the data is not prepared."""
    auxiliary: int = 0
    """Documents of the splits that references learn; 0 where the data is not prepared."""


def material_of(run: RunConfig, tokens: int | None = None) -> Material:
    """Read the shapes and the size of the data, weights and blocks left alone.

    Args:
        run: with the sections ``model`` and ``train``.
        tokens: of the split to learn, where the data is not prepared yet.

    Raises:
        ConfigError: the model is neither a folder, nor a known name, nor on the hub; the engine is opacus; or
            ``tokens`` has no effect.
        DataError: the prepared data is malformed.
    """
    model: ModelConfig = run.need("model", "plan")
    train: TrainConfig = run.need("train", "plan")
    if train.engine == "opacus":
        raise ConfigError("train.engine: opacus keeps a gradient per document, which is not planned")
    manifest = _manifest(run.data, tokens)
    if manifest is not None and tokens is not None:
        raise ConfigError(f"--tokens: {run.data.dir} is prepared, which says how many tokens there are; leave it out")
    length = run.data.block_length if manifest is None else manifest.block_length
    vocabulary = (run.data.vocab_size or NEW_TOKENIZER) if manifest is None else manifest.vocabulary
    blocks, documents, auxiliary = None if tokens is None else max(1, tokens // length), None, 0
    if manifest is not None:
        entry = split_entry(manifest, train.split, run.data.dir)
        blocks, documents = entry.blocks, entry.documents
        auxiliary = sum(manifest.splits[name].documents for name in AUXILIARY if name in manifest.splits)
    shapes = shapes_of(model, vocabulary)
    other = None if run.reference is None or run.reference.mode == "adapter" else run.reference.models[0]
    reference = (None if other is None else reference_shape(other)) or shapes.plain
    return Material(shapes.trained, reference, length, blocks, documents, auxiliary)


def job_of(run: RunConfig, material: Material, ranks: int) -> Job:
    """Return the job that a run is on so many ranks, with its DeepSpeed configuration read and checked.

    Raises:
        ConfigError: the ranks cannot share the batch or be dealt to the stages, JSON and YAML contradict each other, or
            the layout is one that is not planned.
    """
    train: TrainConfig = run.need("train", "plan")
    if ranks % train.stages:
        raise ConfigError(
            f"train.pipeline.stages: {train.stages} stages cannot share {ranks} ranks evenly; change either"
        )
    config = training_config(train, ranks // train.stages)
    return make_job(run, material, ranks, config)


def make_job(run: RunConfig, material: Material, ranks: int, config: Json) -> Job:
    """Return the job of a run with a complete DeepSpeed configuration.

    Raises:
        ConfigError: the layout is one that is not planned.
    """
    train, model = run.train, run.model
    assert train is not None
    assert train.engine != "opacus"
    assert model is not None
    zero = config["zero_optimization"]
    sizes = {field: int(zero[key]) for field, key in SETTINGS.items() if isinstance(zero.get(key), int | float)}
    reference, pipeline = run.reference, train.pipeline
    layers_of_stages = None if pipeline is None else layers_per_stage(material.shape, pipeline.stages, pipeline.balance)
    try:
        return Job(
            ranks=ranks,
            length=material.length,
            rows=config["train_micro_batch_size_per_gpu"],
            engine=train.engine,
            zero_stage=zero_stage(config),
            precision=train.precision,
            stages=train.stages,
            layers_per_stage=layers_of_stages,
            micro_batches=train.gradient_accumulation,
            keep_gathered=pipeline is not None and pipeline.keep_gathered,
            activation_checkpointing=model.activation_checkpointing,
            loss_memory_mib=train.loss_memory_mib or ACCELERATOR_LOSS_MEMORY_MIB,
            offload_parameters=zero.get("offload_param", {}).get("device", "none"),
            offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none"),
            reference="none" if reference is None else reference.mode,
            reference_precision="fp32" if reference is None else reference.precision,
            reference_sharded=reference is not None and reference.deepspeed is not None,
            reference_rows=8 if reference is None else reference.batch_size,
            quantized=model.quantize is not None,
            scores_step=scores_step(train, run.selection),
            skips_masked=model.attention == "flash_attention_2",
            overlap=zero.get("overlap_comm"),
            data_workers=train.data_workers,
            **sizes,
        )
    except ValueError as error:
        raise ConfigError(f"{train.deepspeed or 'train'}: cannot be planned: {error}") from None


def scores_step(train: TrainConfig, selection: SelectionConfig | None) -> bool:
    """Return whether tokens are ranked over a whole step of several micro-batches, which takes a pass of its own."""
    scope = "micro_batch" if selection is None else selection.scope
    return scope == "step" and train.gradient_accumulation > 1


def layers_per_stage(shape: ModelShape, stages: int, balance: str | Sequence[int]) -> tuple[int, ...]:
    """Return how an engine deals the decoder layers to its stages.

    Raises:
        ConfigError: there are more stages than layers, or ``train.pipeline.balance`` does not add up.
    """
    bounds = cut([sum(layer) for layer in shape.layers], shape.vocabulary * shape.hidden, stages, balance)
    return tuple(each.stop - each.first for each in bounds)


def _manifest(data: DataConfig, tokens: int | None) -> Manifest | None:
    """Return the manifest of prepared data; None where a local folder is not prepared, or an address not to be read."""
    if tokens is not None if is_address(data.dir) else not (Path(data.dir) / MANIFEST).is_file():
        return None
    return load_manifest(location_of(data.dir, data.stream))
