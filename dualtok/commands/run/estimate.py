"""How long the steps that are left will take, from those that are done."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from dualtok.commands.run.step import prepared
from dualtok.config.data import is_address
from dualtok.data.manifest import load_manifest
from dualtok.errors import DualtokError
from dualtok.train.checks import count_steps
from dualtok.train.history import read_history

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dualtok.commands.run.step import Step
    from dualtok.data.manifest import Manifest

TRAINING_PASSES = 3.0
"""Of forward passes, that a training step takes the time of: forward, and backward for inputs and for weights."""


def seconds_left(left: Sequence[Step], taken: Mapping[str, float], done: Sequence[Step]) -> float | None:
    """Return the seconds that steps will take; None before one with blocks to count is done.

    A step takes the time of its passes, and a time to start in that is the same for all.

    Args:
        left: the steps to come.
        taken: seconds of those that are done, by name.
        done: these.
    """
    measured = [
        (work, taken[step.name], _computing(step, taken[step.name]))
        for step in done
        if step.name in taken and (work := work_of(step)) is not None
    ]
    passes = sum(work for work, _, _ in measured)
    if not passes:
        return None
    rate = sum(computing for _, _, computing in measured) / passes
    start = sum(seconds - computing for _, seconds, computing in measured) / len(measured)
    idle = [taken[step.name] for step in done if step.name in taken and step.verb == "export"]
    each = sum(idle) / len(idle) if idle else 0.0
    return sum(each if (work := work_of(step)) is None else start + rate * work for step in left)


def _computing(step: Step, seconds: float) -> float:
    """Return the seconds that a step computed, by the speed that a training run has noted; else all of them."""
    train = step.run.train
    manifest = _manifest(step)
    if step.verb != "train" or step.product is None or train is None or manifest is None:
        return seconds
    history = read_history(step.product.parent / "metrics.jsonl")
    speeds = [row["tokens_per_second"] for row in history if row.get("tokens_per_second")]
    if not speeds:
        return seconds
    tokens = len(history) * train.batch_size * manifest.block_length
    return min(seconds, tokens / statistics.median(speeds))


def work_of(step: Step) -> float | None:
    """Return the forward passes of blocks that a step makes; None if it makes none, or there is no data yet."""
    manifest = _manifest(step)
    if manifest is None:
        return None
    blocks = {name: split.blocks for name, split in manifest.splits.items()}
    run = step.run
    if step.verb == "train" and run.train is not None:
        try:
            steps = count_steps(run.train, blocks.get(run.train.split, 0))
        except DualtokError:
            return None
        return TRAINING_PASSES * steps * run.train.batch_size
    if step.verb == "score" and run.reference is not None:
        return float(len(run.reference.models) * sum(blocks.get(split, 0) for split in run.reference.splits))
    if step.verb == "audit" and not run.audit.of_texts:
        models = len(run.audit.models) + len(run.audit.references)
        return float(models * sum(blocks.get(split, 0) for split in run.audit.splits))
    return None


def _manifest(step: Step) -> Manifest | None:
    if is_address(step.run.data.dir) or not prepared(step.run).is_file():
        return None
    return load_manifest(Path(step.run.data.dir))
