"""Each rank's times, brought together once per log interval."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from dualtok.data.stream.rank_batches import Fetches, RankBatches
from dualtok.monitor.devices import peak_tflops
from dualtok.monitor.ranks import Efficiency, RankTable, RankTimes
from dualtok.plan.flops import flops_per_token
from dualtok.plan.shape import read_shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from dualtok.config.run import RunConfig
    from dualtok.distributed.layout import Layout
    from dualtok.distributed.ranks import Ranks
    from dualtok.model.losses import Batch
    from dualtok.monitor.timing import PhaseTimer

# Imported where they are used, for what they take to load: transformers (1 to 4 s).

LOG = logging.getLogger(__name__)


@dataclass
class RunWatch:
    """What this rank counts beside its times, and the table of all ranks. Every rank calls every method."""

    timer: PhaseTimer
    layout: Layout
    _tokens: int = 0
    _loader: RankBatches | None = None
    _waiting: int = 0
    _yielded: int = 0
    _fetches: Fetches = field(default_factory=Fetches)
    _hosts: list[str] = field(default_factory=list)

    def follow(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Take note of what reads ahead, if something does."""
        if isinstance(batches, RankBatches):
            self._loader, self._waiting, self._yielded, self._fetches = batches, 0, 0, Fetches()
        return batches

    def count(self, window: Sequence[Batch]) -> None:
        """Count the positions of a step's micro-batches."""
        self._tokens += sum(batch["input_ids"].numel() for batch in window)

    def table(self) -> tuple[RankTable, int]:
        """Return what all ranks measured since the last call, and over how many steps."""
        times = self.timer.take()
        mine = RankTimes.of(times, tokens=self._tokens / max(1, times.steps), **self._loading())
        self._tokens = 0
        ranks = self.layout.ranks
        if not self._hosts:
            self._hosts = ranks.gather_objects(socket.gethostname())
        rows, _ = ranks.gather(torch.tensor(mine.row(), dtype=torch.float64, device=ranks.device))
        everyone = [RankTimes.of_row(row) for row in rows.view(ranks.world_size, -1).tolist()]
        return RankTable(everyone, self.layout.stages, self._hosts), times.steps

    def _loading(self) -> dict[str, float | int | None]:
        """Return how the data came since the last call."""
        if self._loader is None:
            return {}
        waiting, yielded, fetches = self._loader.waiting, self._loader.yielded, self._loader.fetches()
        new = fetches - self._fetches
        depth = None
        if self._loader.reads_ahead and yielded > self._yielded:
            depth = (waiting - self._waiting) / (yielded - self._yielded)
        self._waiting, self._yielded, self._fetches = waiting, yielded, fetches
        return {"queue_depth": depth, "shards_opened": new.opened, "shards_ready": new.ready}


def efficiency(run: RunConfig, start: Path, block_length: int, ranks: Ranks) -> Efficiency | None:
    """Return the FLOPs and peak used to compute MFU; None where the device's peak or the model's sizes are not known.

    Args:
        run: its settings.
        start: folder with the model's configuration.
        block_length: tokens per block.
        ranks: the job's; only the first, which writes events, gets an answer.
    """
    if not ranks.is_first:
        return None
    peak, device = run.monitor.peak_tflops, ranks.device
    if peak is None and device.type == "cuda" and run.train is not None and run.train.precision == "bf16":
        peak = peak_tflops(torch.cuda.get_device_name(device))
    if peak is None:
        return None
    from transformers import AutoConfig

    try:
        shape = read_shape(AutoConfig.from_pretrained(start))
    except (ValueError, OSError) as error:  # an architecture of the model's own code
        LOG.warning("dualtok: no throughput/mfu: %s", error)
        return None
    frozen = run.model is not None and run.model.adapter is not None
    return Efficiency(flops_per_token(shape, block_length, frozen=frozen), peak)
