"""What ``dualtok plan`` finds."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualtok.plan.hardware import Cluster
    from dualtok.plan.layouts import Option
    from dualtok.plan.leak import Expected
    from dualtok.plan.memory import Reference
    from dualtok.plan.shape import ModelShape


@dataclass(frozen=True)
class Budget:
    """What a whole run takes on disk and in time; None where neither the data is prepared nor its tokens are given."""

    steps: int | None
    tokens: int | None
    """Tokens trained on, all epochs together."""
    hours: float | None
    """Of all steps; evaluations, checkpoints and the start are not in it."""
    shards: int | None
    """Bytes of the split's shards."""
    scores: int | None
    """Bytes of its reference losses."""
    scoring_hours: float | None
    """The pass of ``dualtok score`` on all accelerators; 0 if the reference computes while training."""
    checkpoints: int
    """Bytes of checkpoints at most: those that are kept, the best one, and the next while it is written."""


@dataclass(frozen=True)
class Plan:
    """All that ``dualtok plan`` says."""

    shape: ModelShape
    cluster: Cluster
    own: Option | None
    """The run's layout; None if the ranks cannot run it."""
    refused: str
    """Why not; empty if they can."""
    options: list[Option]
    """All layouts, best first."""
    references: dict[Reference, tuple[float, float, float]]
    """Mode -> bytes on a device, bytes on a host, seconds per step; in the run's own layout or the best one."""
    budget: Budget
    expected: Expected | None
    """What the run gains and gives away; None where its documents or epochs are not known."""
    mfu: float
    """Share of the device's peak in the layout that the budget is of."""

    @property
    def chosen(self) -> Option:
        """The run's own layout if it fits, else the best one."""
        if self.own is not None and self.own.fits:
            return self.own
        return self.options[0] if self.options else _required(self.own)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "parameters": self.shape.parameters,
            "trained": self.shape.trained,
            "cluster": asdict(self.cluster),
            "run": None if self.own is None else option_dict(self.own),
            "refused": self.refused,
            "mfu": self.mfu,
            "layouts": [option_dict(option) for option in self.options if option.fits],
            "references": {
                mode: dict(zip(("device", "host", "seconds"), found, strict=True))
                for mode, found in self.references.items()
            },
            "budget": asdict(self.budget),
            "expected": None if self.expected is None else self.expected.as_dict(),
        }


def _required(option: Option | None) -> Option:
    assert option is not None
    return option


def option_dict(option: Option) -> dict[str, Any]:
    """Return a layout's figures as plain values; bytes per rank are those of the fullest stage."""
    largest = option.memory.largest
    return {
        "name": option.name,
        "fits": option.fits,
        "job": asdict(option.job),
        "memory": {
            **{field.name: asdict(getattr(largest, field.name)) for field in dataclasses.fields(largest)},
            "total": asdict(largest.total),
        },
        "device_room": option.device_room,
        "host_room": option.host_room,
        "seconds": {**asdict(option.time), "total": option.time.total},
        "tokens_per_second": option.tokens_per_second,
    }
