"""Settings of the dual loss in the Trainer: those of a run file's ``selection``, and of the loss head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dualtok.objective.settings import SelectionConfig, check_choice

LossBackend = Literal["torch", "cut_cross_entropy", "liger"]


@dataclass(frozen=True)
class DualConfig(SelectionConfig):
    """Shares, threshold and weight of the dual loss, and how it is computed; names and defaults are a run file's.

    Raises:
        ValueError: a share, threshold, weight or name means nothing.
    """

    loss_memory_mib: float | None = None
    """Memory for logits, as ``train.loss_memory_mib``: None takes 256 MiB on a CPU and 1 GiB on an accelerator.
    Unit: MiB."""

    loss_backend: LossBackend = "torch"
    """What computes the losses, as ``train.loss_backend``; the kernels other than ``torch`` need a GPU."""

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        super().__post_init__()
        check_choice("loss_backend", self.loss_backend, get_args(LossBackend))
        if self.loss_memory_mib is not None and not self.loss_memory_mib > 0:
            raise ValueError(f"loss_memory_mib: must be positive, got {self.loss_memory_mib}")
