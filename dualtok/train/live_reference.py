"""The live reference that a run asks for: its model checked, then built around a forward pass on this job's ranks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dualtok.distributed.deepspeed_config import offload_json
from dualtok.distributed.forward_only import build_forward_only
from dualtok.model.check import check_model
from dualtok.model.folder.weights import model_folder
from dualtok.reference.background import BackgroundReference, WorkerSettings, share_cores
from dualtok.reference.live import Share, WindowReference

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.config.reference import ReferenceConfig
    from dualtok.data.folder import DataFolder
    from dualtok.distributed.layout import Layout
    from dualtok.distributed.ranks import Ranks
    from dualtok.reference.live import LiveReference


def check_reference(reference: ReferenceConfig, data: DataFolder) -> Path:
    """Return the reference model's folder after comparing it with the blocks; reads no weights.

    Raises:
        ConfigError: there is no such model, it is not whole, or it does not fit the blocks.
    """
    folder = model_folder(reference.origin)
    check_model(
        folder,
        data,
        origin=f"reference.model {reference.origin}",
        trust_remote_code=reference.trust_remote_code,
        setting="reference.trust_remote_code",
    )
    return folder


def build_reference(reference: ReferenceConfig, folder: Path, layout: Layout) -> LiveReference:
    """Build the reference of the modes ``offload``, ``cpu`` and ``resident``.

    Must come before the engine in training: a pipeline's grid, which DeepSpeed keeps in a global, would become the
    reference's too.

    Args:
        reference: the run's section.
        folder: the reference model's, from :func:`check_reference`.
        layout: the job's ranks.

    Raises:
        ConfigError: the reference's architecture, DeepSpeed JSON or cores cannot be used.
        DualtokError: the background worker died.
    """
    ranks = layout.ranks
    share = replica_share(layout.replica)
    if reference.mode == "cpu":
        return ranks.together(lambda: _background(reference, folder, share))
    config: str | dict[str, object] | None = reference.deepspeed
    if reference.mode == "offload":
        config = offload_json(reference.deepspeed, on_accelerator=ranks.device.type != "cpu")
    forward = build_forward_only(
        folder,
        precision=reference.precision,
        batch_size=reference.batch_size,
        deepspeed_json=config,
        ranks=ranks,
        trust_remote_code=reference.trust_remote_code,
    )
    return WindowReference(forward, reference.batch_size, share)


def replica_share(replica: Ranks) -> Share:
    """Return how the ranks of one replica, its pipeline stages, share the scoring of their common blocks."""
    if replica.world_size == 1:
        return Share()

    def exchange(losses: torch.Tensor) -> list[torch.Tensor]:
        here = losses.to(replica.device)
        everyone = [torch.empty_like(here) for _ in range(replica.world_size)]
        dist.all_gather(everyone, here, group=replica.group)
        return everyone

    return Share(replica.rank, replica.world_size, exchange)


def _background(reference: ReferenceConfig, folder: Path, share: Share) -> BackgroundReference:
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    cores = share_cores(reference.cores, int(os.environ.get("LOCAL_RANK", "0")), local_ranks)
    threads = reference.threads or (1 if cores is None else len(cores))
    settings = WorkerSettings(
        str(folder), reference.precision, reference.batch_size, threads, cores, reference.trust_remote_code
    )
    return BackgroundReference(settings, reference.prefetch, share)
