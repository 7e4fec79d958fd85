"""A run file that leaves its reference to ``dualtok run``, as ``dualtok plan`` is to see it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dualtok.config.reference import ReferenceConfig
from dualtok.objective.settings import NEEDS_REFERENCE

if TYPE_CHECKING:
    from dualtok.config.run import RunConfig

ITS_OWN = "reference"
"""Stands for a model that is not there yet: the planner then takes the shape of the model in training."""


def with_its_reference(run: RunConfig) -> RunConfig:
    """Return the run with a reference of its model's shape, where ``dualtok run`` will train one."""
    if run.workflow is None or run.train is None:
        return run
    if run.reference is None and run.loss in NEEDS_REFERENCE:
        return replace(run, reference=ReferenceConfig(model=ITS_OWN))
    if run.reference is not None and run.reference.mode != "adapter" and not run.reference.folds:
        return replace(run, reference=replace(run.reference, model=run.reference.model or ITS_OWN))
    return run
