"""Figures of a training step, summed over micro-batches and ranks; and their history on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from dualtok.data.stream.blocks import SKIPPED
from dualtok.files import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.distributed.ranks import Ranks
    from dualtok.model.losses import Batch
    from dualtok.objective.token_weights import WeightedLoss


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step measured, over all ranks and micro-batches."""

    step: int
    left_out: str | None
    """``nan`` or ``spike`` if the step was a bad one and changed nothing, else None."""
    loss: float
    """The objective's loss, averaged over micro-batches."""
    hard_loss: float
    """Mean token loss over T_h, nats."""
    memorized_loss: float
    """Mean token loss over T_m, nats; NaN when T_m is empty."""
    plain_loss: float
    """Mean token loss over all predicted tokens, nats."""
    hard_tokens: int
    memorized_tokens: int
    tokens: int
    """Predicted tokens."""
    skipped_blocks: int
    """Blocks of bad shards, which were empty; see ``data.on_bad_shard``."""
    gradient_norm: float
    """Norm of the global gradient before clipping."""
    learning_rate: float
    """Learning rate of this step."""
    tokens_per_second: float
    peak_memory_gib: float
    """Largest memory in use on rank 0: of the accelerator, or resident in the host where there is none."""

    @property
    def shares(self) -> dict[str, float]:
        """Shares of hard, memorized and neutral tokens."""
        hard, memorized = self.hard_tokens / max(self.tokens, 1), self.memorized_tokens / max(self.tokens, 1)
        return {"hard": hard, "memorized": memorized, "neutral": 1.0 - hard - memorized}


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


class History:
    """One JSON object per line, one line per step; rank 0 alone writes.

    Args:
        path: the file; None keeps nothing.
        resumed_at: steps done before; later lines, of steps that will be repeated, are dropped.
    """

    def __init__(self, path: Path | None, resumed_at: int = 0) -> None:
        self._path = path
        self.forget_after(resumed_at)

    def forget_after(self, step: int) -> None:
        """Drop the lines of later steps, which will be repeated."""
        if self._path is not None:
            kept = [line for line in read_history(self._path) if line["step"] <= step]
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, entry: Any) -> None:
        """Append a dataclass instance or dictionary with a ``step``."""
        if self._path is not None:
            values = entry if isinstance(entry, dict) else asdict(entry)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read a history; an unfinished last line, left by a crash, is dropped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of the accelerator, or the peak resident size of this process where there is none."""
    if device.type == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.get_device_module(device).max_memory_allocated(device) / 2**30
