"""Who does what: pipeline stages across, data-parallel replicas along.

With P stages and D replicas rank r works on stage r // D for replica r % D, as DeepSpeed's PipeDataParallelTopology has
it: the ranks of one stage are neighbors, so that their collectives, the larger ones, stay within a host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch.distributed as dist

from dualtok.errors import ConfigError

if TYPE_CHECKING:
    from dualtok.distributed.ranks import Ranks


@dataclass(frozen=True)
class Layout:
    """This rank's place in the job."""

    ranks: Ranks
    """All ranks of the job."""
    stages: int
    """Pipeline stages P; 1 without a pipeline."""
    stage: int
    """The stage that this rank works on."""
    data_parallel: Ranks
    """The ranks of this stage, one per replica. They read different blocks; gradients are averaged over them."""
    replica: Ranks
    """The ranks of this replica, one per stage. They read the same blocks."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embeddings."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head and computes the loss."""
        return self.stage == self.stages - 1


def build_layout(ranks: Ranks, stages: int = 1) -> Layout:
    """Split a job's ranks into stages and replicas; every rank must call it equally often.

    Raises:
        ConfigError: the stages do not divide the ranks.
    """
    if ranks.world_size % stages:
        raise ConfigError(
            f"train.pipeline.stages: {stages} stages cannot share {ranks.world_size} ranks evenly; start a multiple of "
            f"{stages} ranks, or change the stages"
        )
    if stages == 1:
        return Layout(ranks, 1, 0, ranks, replace(ranks, rank=0, world_size=1))
    replicas = ranks.world_size // stages
    stage, replica = divmod(ranks.rank, replicas)
    by_stage = [list(range(first * replicas, (first + 1) * replicas)) for first in range(stages)]
    by_replica = [list(range(first, ranks.world_size, replicas)) for first in range(replicas)]
    # Every rank takes part in the making of every group, in the same order.
    stage_groups = [dist.new_group(members) for members in by_stage]
    replica_groups = [dist.new_group(members) for members in by_replica]
    ranks.barrier()  # a rank that finds an error in the settings ends at once, while others still look for it
    return Layout(
        ranks,
        stages,
        stage,
        replace(ranks, rank=replica, world_size=replicas, group=stage_groups[stage]),
        replace(ranks, rank=stage, world_size=stages, group=replica_groups[replica]),
    )
