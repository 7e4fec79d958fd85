"""Figures of a training step, summed over micro-batches and ranks; and their history on disk."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

import torch

from dualtok.data.stream.blocks import SKIPPED
from dualtok.train.history import StepMetrics

if TYPE_CHECKING:
    from dualtok.distributed.ranks import Ranks
    from dualtok.model.losses import Batch
    from dualtok.objective.token_weights import WeightedLoss


class StepTotals:
    """Sums of one optimizer step on this rank; float64, so that the order of micro-batches does not show."""

    FIELDS = ("loss", "hard_sum", "hard_count", "memorized_sum", "memorized_count", "plain_sum", "plain_count")
    """The loss, then :attr:`TokenWeights.totals` row by row."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(self.FIELDS), dtype=torch.float64, device=device)
        self._asked_to_end = torch.zeros(1, dtype=torch.float64, device=device)
        self._skipped_blocks = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, outcome: WeightedLoss) -> None:
        """Add the objective's result on this rank for one micro-batch."""
        self._sums += torch.cat([outcome.loss.detach().double().view(1), outcome.weights.totals.flatten()])

    def ask_to_end(self) -> None:
        """Let all ranks know that this one was told to end."""
        self._asked_to_end += 1

    def take_skipped(self, batch: Batch) -> None:
        """Count the blocks of a micro-batch that are empty for want of their shard; takes the mark out of it."""
        if (mark := batch.pop(SKIPPED, None)) is not None:
            self._skipped_blocks += int(mark.sum())

    def reduce(self, ranks: Ranks, losses: int) -> dict[str, float]:
        """Return the totals over all ranks; ``asked_to_end``, how many of them were told to end; ``skipped_blocks``,
        which each stage of a pipeline counts. ``loss`` is the mean over ``losses``, those of all micro-batches and
        replicas."""
        sums = ranks.sum(torch.cat([self._sums, self._asked_to_end, self._skipped_blocks])).tolist()
        total = dict(zip((*self.FIELDS, "asked_to_end", "skipped_blocks"), sums, strict=True))
        total["loss"] /= losses
        return total


def step_metrics(totals: dict[str, float], **measured: Any) -> StepMetrics:
    """Turn reduced totals into a step's metrics."""

    def mean(name: str) -> float:
        return totals[f"{name}_sum"] / totals[f"{name}_count"] if totals[f"{name}_count"] else float("nan")

    return StepMetrics(
        loss=totals["loss"],
        hard_loss=mean("hard"),
        memorized_loss=mean("memorized"),
        plain_loss=mean("plain"),
        hard_tokens=int(totals["hard_count"]),
        memorized_tokens=int(totals["memorized_count"]),
        tokens=int(totals["plain_count"]),
        **measured,
    )


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of the accelerator, or the peak resident size of this process where there is none."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.get_device_module(device).max_memory_allocated(device) / 2**30
