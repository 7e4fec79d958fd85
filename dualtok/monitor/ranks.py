"""What all ranks spent their time on, as the few figures that tell which of them holds the others up."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dualtok.monitor.timing import COMMUNICATION, OTHER, PHASES, PIPELINE, StepTimes

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class RankTimes:
    """What one rank measured over some steps. Seconds are per step."""

    wall: float
    """From a step's beginning to its end."""
    phases: dict[str, float]
    """By :data:`~dualtok.monitor.timing.PHASES`; they sum to ``wall``."""
    busy: float = 0.0
    """Forward and backward passes with the collectives inside them."""
    tokens: float = 0.0
    """Positions of the blocks per step, padding included."""
    queue_depth: float | None = None
    """Micro-batches that lay read when one was asked for, on average; None where nothing reads ahead."""
    shards_opened: int = 0
    """Shards at an address that were opened, over all steps."""
    shards_ready: int = 0
    """Of which lay on the host already."""

    FIELDS = ("wall", *PHASES, "busy", "tokens", "queue_depth", "shards_opened", "shards_ready")
    """The order in which they travel."""

    @classmethod
    def of(cls, times: StepTimes, **figures: Any) -> RankTimes:
        """Return the means of some steps' times."""
        steps = max(1, times.steps)
        phases = {name: times.phases.get(name, 0.0) / steps for name in PHASES}
        return cls(times.wall / steps, phases, times.busy / steps, **figures)

    @property
    def own(self) -> float:
        """Seconds in which the rank waited for no other: what makes a straggler."""
        return self.wall - self.phases[COMMUNICATION] - self.phases[PIPELINE]

    def row(self) -> list[float]:
        """Return the figures in the order of :data:`FIELDS`."""
        values = {**asdict(self), **self.phases}
        return [-1.0 if values[name] is None else float(values[name]) for name in self.FIELDS]

    @classmethod
    def of_row(cls, row: Sequence[float]) -> RankTimes:
        """Return what :meth:`row` has packed."""
        values = dict(zip(cls.FIELDS, row, strict=True))
        phases = {name: values.pop(name) for name in PHASES}
        depth = values["queue_depth"]
        return cls(
            values["wall"],
            phases,
            values["busy"],
            values["tokens"],
            None if depth < 0 else depth,
            round(values["shards_opened"]),
            round(values["shards_ready"]),
        )


@dataclass(frozen=True)
class Efficiency:
    """What a device could do, to be compared with what it does."""

    flops_per_token: float
    peak_tflops: float
    """Of one rank's device."""


@dataclass
class RankTable:
    """All ranks over the same steps, in rank order."""

    ranks: list[RankTimes]
    stages: int = 1
    """Pipeline stages; the stages of a replica read the same blocks."""
    hosts: Sequence[str] = field(default_factory=list)
    """The host of each rank."""

    @property
    def slowest(self) -> int:
        """The rank that waits least for others."""
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].own)

    @property
    def bubble(self) -> float:
        """Share of the pipeline's time in which a stage computes nothing, averaged over ranks.

        One minus busy time over the longest schedule: the time of the stage that waits until the last gradient comes
        back. The optimizer and what is summed over ranks after the schedule are no part of it.
        """
        schedule = max(rank.busy + rank.phases[PIPELINE] for rank in self.ranks)
        return 1.0 - statistics.fmean(rank.busy for rank in self.ranks) / schedule if schedule else 0.0

    def utilization(self, efficiency: Efficiency) -> float:
        """Return the model FLOP utilization: operations that the blocks need over what the devices could do meanwhile.

        Time within steps alone; evaluations and checkpoints are left out.
        """
        needed = efficiency.flops_per_token * sum(rank.tokens for rank in self.ranks) / self.stages
        wall = max(rank.wall for rank in self.ranks)
        return needed / (wall * len(self.ranks) * efficiency.peak_tflops * 1e12)

    def scalars(self, efficiency: Efficiency | None = None) -> dict[str, float | None]:
        """Return the events' values under their names; None where there is nothing to tell."""
        values: dict[str, float | None] = {"time/step": max(rank.wall for rank in self.ranks)}
        for name in PHASES:
            seconds = [rank.phases[name] for rank in self.ranks]
            if name == OTHER or max(seconds) > 0:
                values |= {f"time/{name}": statistics.fmean(seconds), f"time_max/{name}": max(seconds)}
        if len(self.ranks) > 1:
            own = [rank.own for rank in self.ranks]
            values["ranks/slowest"] = float(self.slowest)
            values["ranks/slowest_ratio"] = max(own) / max(statistics.median(own), 1e-9)
        if self.stages > 1:
            values["pipeline/bubble"] = self.bubble
        if efficiency is not None:
            values["throughput/mfu"] = self.utilization(efficiency)
        depths = [rank.queue_depth for rank in self.ranks if rank.queue_depth is not None]
        if depths:
            values["data/queue_depth"] = min(depths)
        if opened := sum(rank.shards_opened for rank in self.ranks):
            values["data/prefetch_hit_rate"] = sum(rank.shards_ready for rank in self.ranks) / opened
        return values

    def entry(self, step: int, steps: int) -> dict[str, Any]:
        """Return the line of ``ranks.jsonl``: every rank's figures, rounded to a microsecond."""
        rows = [
            {
                "rank": number,
                **({"host": self.hosts[number]} if self.hosts else {}),
                **{name: round(seconds, 6) for name, seconds in {"wall": rank.wall, **rank.phases}.items()},
                "busy": round(rank.busy, 6),
                "own": round(rank.own, 6),
                "tokens": rank.tokens,
                "queue_depth": rank.queue_depth,
                "shards_opened": rank.shards_opened,
                "shards_ready": rank.shards_ready,
            }
            for number, rank in enumerate(self.ranks)
        ]
        return {"step": step, "steps": steps, "slowest": self.slowest, "ranks": rows}
