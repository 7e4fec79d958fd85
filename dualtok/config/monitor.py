"""Settings of events and terminal output."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(config=ConfigDict(extra="forbid"))
class WandbConfig:
    """A run at Weights & Biases, through DeepSpeed's monitor. Keys and modes are W&B's own: ``WANDB_API_KEY``,
    ``WANDB_MODE``."""

    project: str = "dualtok"
    """Name of the project."""

    group: str | None = None
    """Group of runs that belong together."""

    team: str | None = None
    """Team, or user, that owns the project; W&B's ``entity``."""


@dataclass(config=ConfigDict(extra="forbid"))
class CometConfig:
    """An experiment at Comet, through DeepSpeed's monitor. The key is Comet's own ``COMET_API_KEY``."""

    project: str | None = "dualtok"
    """Name of the project; None takes Comet's own configuration."""

    workspace: str | None = None
    """Workspace that owns the project."""

    experiment_name: str | None = None
    """Name of the experiment; None lets Comet choose."""

    online: bool = True
    """False writes an archive to ``<output_dir>/comet``, for ``comet upload``."""


@dataclass(config=ConfigDict(extra="forbid"))
class MonitorConfig:
    """What is written while training, by rank 0 alone; how long a rank may hang, and a host be silent."""

    tensorboard: bool = True
    """Write TensorBoard events to ``<output_dir>/events``."""

    csv: bool = False
    """Write the same scalars to ``<output_dir>/csv``, a file per name, through DeepSpeed's monitor."""

    wandb: WandbConfig | None = None
    """Send the same scalars to Weights & Biases; ``{}`` takes the defaults."""

    comet: CometConfig | None = None
    """Send the same scalars to Comet; ``{}`` takes the defaults."""

    log_every: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps between two sets of events and, when the output is not a terminal, between two plain lines. Unit:
    optimizer steps."""

    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """TFLOP/s that one rank's device reaches at best, for ``throughput/mfu``; None knows NVIDIA's A100, H100 and H200
    in bf16 (dense, from the data sheets) and leaves the event out elsewhere."""

    hang_seconds: Annotated[float, Field(ge=1)] = 1800.0
    """Seconds without progress on a rank, be it a step, an evaluation or a checkpoint, after which it writes the stacks
    of its threads to ``<output_dir>/stacks`` and ends the job. The first step may compile operators for minutes."""

    heartbeat_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Seconds of silence after which a host of the job counts as lost: the others name it and end. Hosts hear from each
    other every few seconds apart from training's collectives, so that slow steps and compilations don't matter. 0 turns
    this off; on one host nothing is watched."""

    histogram_every: Annotated[int, Field(ge=0)] = 100
    """Optimizer steps between two histograms of s(t); 0 writes none. Unit: optimizer steps."""
