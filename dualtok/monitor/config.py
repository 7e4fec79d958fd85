"""Settings of events and terminal output."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(config=ConfigDict(extra="forbid"))
class MonitorConfig:
    """What is written while training, by rank 0 alone; how long a rank may hang, and a host be silent."""

    tensorboard: bool = True
    """Write TensorBoard events to ``<output_dir>/events``."""

    log_every: Annotated[int, Field(ge=1)] = 10
    """Optimiser steps between two sets of events and, when the output is not a terminal, between two plain lines."""

    hang_seconds: Annotated[float, Field(ge=1)] = 1800.0
    """Seconds without progress on a rank, be it a step, an evaluation or a checkpoint, after which it writes the stacks
    of its threads to ``<output_dir>/stacks`` and ends the job. The first step may compile operators for minutes."""

    heartbeat_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Seconds of silence after which a host of the job counts as lost: the others name it and end. Hosts hear from each
    other every few seconds apart from training's collectives, so that slow steps and compilations don't matter. 0 turns
    this off; on one host nothing is watched."""

    histogram_every: Annotated[int, Field(ge=0)] = 100
    """Optimiser steps between two histograms of s(t); 0 writes none."""
