"""What is checked before a run starts or goes on: steps, its reference, its settings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dualtok.config.run import flat
from dualtok.errors import ConfigError
from dualtok.objective.settings import NEEDS_REFERENCE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dualtok.config.run import RunConfig
    from dualtok.config.train import TrainConfig


ROUNDING = 1e-9
FREE_ON_RESUME = (
    "monitor",
    "audit",
    "interpolate",
    "launch",
    "workflow",
    "output_dir",
    "data.processes",
    "data.source",
    "data.stream",
    "data.on_bad_shard",
    "train.data_workers",
    "train.evaluate_every",
    "train.evaluation_blocks",
    "train.checkpoint_every",
    "train.checkpoint_keep",
    "train.checkpoint_in_background",
    "train.engine",
    "train.pipeline",
    "train.deepspeed",
    "train.loss_backend",
    "train.loss_memory_mib",
    "train.guard",
    "reference.prefetch",
    "reference.threads",
    "reference.cores",
)
"""Settings that change nothing about what is learned."""


def count_steps(settings: TrainConfig, blocks: int) -> int:
    """Return the optimizer steps of a run over a split of ``blocks`` blocks.

    The last step of ``train.epochs`` may take some blocks of one more pass, less than a batch.

    Raises:
        ConfigError: a batch holds more blocks than the split.
    """
    if settings.batch_size > blocks:
        raise ConfigError(
            f"train.batch_size: {settings.batch_size} blocks, but the split {settings.split!r} has {blocks}, so that a "
            "step would see some of them twice; make it smaller"
        )
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    return max(1, math.ceil(settings.epochs * blocks / settings.batch_size - ROUNDING))


def require_reference(run: RunConfig) -> None:
    """Raise ConfigError if the objective needs a reference that the run does not have."""
    if run.loss in NEEDS_REFERENCE and run.reference is None:
        raise ConfigError(f"objective {run.objective!r} needs the section 'reference' with the model that was scored")


def changes(earlier: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings that make two runs learn differently: dotted key, earlier and present value."""
    before, after = flat(earlier), flat(now)
    for key in sorted(before.keys() | after.keys()):
        if not key.startswith(FREE_ON_RESUME) and before.get(key) != after.get(key):
            yield key, before.get(key), after.get(key)
