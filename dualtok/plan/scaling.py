"""A run on more and more machines: where the time of a step goes from 8 to thousands of accelerators.

The tokens of a step stay the same as long as every replica has a block of its own; from then on the batch grows with
the replicas, as it must, and the result says so. Each point is the fastest layout of its family that fits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from dualtok.plan.layouts import weigh
from dualtok.plan.memory import Job
from dualtok.plan.speed import model_flops

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dualtok.plan.hardware import Cluster
    from dualtok.plan.layouts import Option
    from dualtok.plan.shape import ModelShape

Family = Literal["zero3", "pipeline", "sharded_pipeline"]
COUNTS = tuple(2**power for power in range(3, 15))
"""8 to 16,384 accelerators."""
STAGES = (2, 4, 8, 16, 32, 64)
MOST_ROWS = 8
"""Blocks of a micro-batch on one rank that are tried at most."""


@dataclass(frozen=True)
class Point:
    """The best layout of a family on so many accelerators."""

    gpus: int
    option: Option
    tokens: int
    """Of a step."""
    mfu: float
    """Model FLOP utilization."""

    @property
    def shares(self) -> dict[str, float]:
        """Share of the step's time by what it is spent on."""
        time = self.option.time
        return {
            "compute": time.compute / time.total,
            "exposed communication": time.communication / time.total,
            "pipeline bubble": time.bubble / time.total,
            "optimizer": (time.optimizer + time.reference) / time.total,
            "data reading": time.reading / time.total,
        }


def scale(
    shape: ModelShape, family: Family, cluster: Cluster, *, length: int, tokens: int, counts: Sequence[int] = COUNTS
) -> list[Point]:
    """Return the points of a family; counts on which nothing fits are left out.

    Args:
        shape: of the model.
        family: plain ZeRO-3, a pipeline with ZeRO-1, or a sharded pipeline.
        cluster: of these machines; how many of them follows from the counts.
        length: tokens per block.
        tokens: of a step, as long as the replicas can share them.
        counts: accelerators in all.
    """
    points = []
    for gpus in counts:
        per_host = min(gpus, cluster.gpus)
        machines = replace(cluster, nodes=gpus // per_host, gpus=per_host)
        found = [weigh(shape, job, machines) for job in _jobs(shape, family, gpus, length, tokens)]
        fitting = [option for option in found if option.fits]
        if fitting:
            best = max(fitting, key=lambda option: option.tokens_per_second)
            job = best.job
            flops = model_flops(shape, length) * best.tokens_per_second
            step_tokens = job.replicas * job.micro_batches * job.tokens
            points.append(Point(gpus, best, step_tokens, flops / (gpus * cluster.device.flops)))
    return points


def _jobs(shape: ModelShape, family: Family, gpus: int, length: int, tokens: int) -> Iterator[Job]:
    for stages in (1,) if family == "zero3" else STAGES:
        if gpus % stages or stages > len(shape.layers):
            continue
        replicas = gpus // stages
        each = max(1, tokens // length // replicas)
        plain = Job(
            ranks=gpus,
            length=length,
            rows=1,
            stages=stages,
            engine="zero" if family == "zero3" else family,
            zero_stage=1 if family == "pipeline" else 3,
            skips_masked=True,
            reference="stored",
            data_workers=0,
        )
        for power in range(MOST_ROWS.bit_length()):
            rows = 2**power
            if each % rows == 0:
                for again in (False, True):
                    cut = replace(plain, rows=rows, micro_batches=each // rows, activation_checkpointing=again)
                    yield cut
                    if family == "sharded_pipeline":
                        yield replace(cut, keep_gathered=True)
