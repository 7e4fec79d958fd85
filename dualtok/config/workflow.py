"""Settings of ``dualtok run``: which models it makes on the way, and how its steps are started."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from dualtok.config.train import TrainConfig
from dualtok.errors import did_you_mean

Count = Annotated[int, Field(ge=1)]
Launcher = Literal["none", "torchrun", "deepspeed", "slurm", "mpi"]
FIXED = ("split", "leave_out")
"""Settings of ``train`` that the way itself gives each model."""


@dataclass(config=ConfigDict(extra="forbid"))
class WorkflowConfig:
    """What ``dualtok run`` does with this file: it trains what is missing, scores, trains, audits and reports."""

    launcher: Launcher = "none"
    """What starts the steps that ranks can share: ``none`` (one process), ``torchrun`` (this host), ``deepspeed``
    (this host, or over pdsh or ssh those of ``launch.hostfile``), ``slurm`` or ``mpi``. The section ``launch`` says how
    several hosts are reached."""

    nodes: Count | None = None
    """Hosts; without it one, or all of ``launch.hostfile``. Unit: hosts."""

    ranks: Count | None = None
    """Ranks per host; without it one per accelerator, or the slots of ``launch.hostfile``. Unit: ranks."""

    plain: bool = False
    """Train plainly as well, on the same documents in the same steps, to compare with."""

    checkpoints: Annotated[tuple[Literal["best", "latest"], ...], Field(min_length=1)] = ("best",)
    """Checkpoints that are exported and audited: the one with the smallest validation loss, the last one, or both."""

    reference: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of ``train`` that differ for the reference, e.g. ``{epochs: 3}``; with ``dual_plus`` for all models that
    are trained before the last one."""

    attack_reference: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of ``train`` that differ for the attacker's reference; none of them is as the audited models are
    trained, which is the recipe to be feared."""

    def __post_init__(self) -> None:
        """Refuse ranks without a launcher, and settings that are none of the section ``train``."""
        for name in ("nodes", "ranks"):
            if self.launcher == "none" and (getattr(self, name) or 1) > 1:
                raise ValueError(
                    f"workflow.{name}: has no effect without a launcher; set workflow.launcher, e.g. torchrun"
                )
        if self.launcher == "torchrun" and (self.nodes or 1) > 1:
            raise ValueError(
                "workflow.nodes: torchrun has to be started on every host; use workflow.launcher=slurm, mpi or "
                "deepspeed, or start the single steps yourself (`dualtok run RUN --dry-run` prints them)"
            )
        known = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in FIXED]
        for section in ("reference", "attack_reference"):
            for name in getattr(self, section):
                if name not in known:
                    raise ValueError(
                        f"workflow.{section}: {name!r} is no setting of `train` that may differ"
                        f"{did_you_mean(name, known)}"
                    )
