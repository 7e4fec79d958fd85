"""Reference losses that are computed while training: what the loop asks for, and who scores which rows.

The engine below a forward pass comes in as a callable, the exchange between ranks too: nothing here knows DeepSpeed.

Legend: b batch, t position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import torch

from dualtok.data.packing import Batch, pad_rows
from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

INPUTS = ("input_ids", "position_ids", "labels")

TokenLosses = Callable[[Batch], torch.Tensor]
"""Batch -> token losses [b, t] without gradients, on any device."""


class LiveReference(Protocol):
    """A frozen reference that scores the blocks as they come. Every rank calls it equally often."""

    def scored(self, batches: Iterator[Batch], window: int) -> Iterator[Batch]:
        """Yield the same batches in the same order with ``reference_loss`` [b, t] (float32, host memory).

        Args:
            batches: this replica's micro-batches; may be read ahead, so the data cursor is the reader's to count.
            window: micro-batches of one optimizer step.
        """

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Return the reference losses [b, t] (float32, host memory) of one batch, now."""

    def close(self) -> None:
        """Free what the reference holds; never waits for long."""


def _alone(losses: torch.Tensor) -> list[torch.Tensor]:
    return [losses]


@dataclass(frozen=True)
class Share:
    """Which rows of the replica's blocks this rank scores: its stages read the same blocks, and share the work."""

    rank: int = 0
    """This rank among those that hold the same blocks."""
    size: int = 1
    """Ranks that hold the same blocks."""
    exchange: Callable[[torch.Tensor], list[torch.Tensor]] = _alone
    """A tensor of equal shape on each of them -> all of theirs, in rank order."""

    def take(self, window: Sequence[Batch]) -> Batch:
        """Return this rank's contiguous part of the rows of some micro-batches.

        Filled up where the rows do not divide: every rank gets equally many, so that under ZeRO-3 all make the same
        forward passes.
        """
        rows = {name: torch.cat([batch[name] for batch in window]) for name in INPUTS}
        total = len(rows["input_ids"])
        each = -(-total // self.size)
        first = min(self.rank * each, total)
        mine = {name: tensor[first : first + each] for name, tensor in rows.items()}
        if len(mine["input_ids"]) == 0:
            mine = {name: tensor[:1].clone() for name, tensor in rows.items()}
            mine["labels"].fill_(IGNORED_LABEL)
        return pad_rows(mine, each)

    def join(self, losses: torch.Tensor, window: Sequence[Batch]) -> list[torch.Tensor]:
        """Return the losses [b, t] of each micro-batch, given this rank's part of the rows of all."""
        everyone = torch.cat(self.exchange(losses.float().contiguous())).cpu()
        sizes = [len(batch["input_ids"]) for batch in window]
        return list(everyone[: sum(sizes)].split(sizes))


def with_reference(batch: Batch, losses: torch.Tensor) -> Batch:
    """Return the batch with ``reference_loss``, 0 where nothing is predicted, exactly as stored scores come."""
    return {**batch, "reference_loss": torch.where(batch["labels"] == IGNORED_LABEL, 0.0, losses)}


def forward_in_pieces(forward: TokenLosses, batch: Batch, rows: int) -> torch.Tensor:
    """Return the losses of a batch, computed ``rows`` blocks at a time."""
    pieces = zip(*(batch[name].split(rows) for name in INPUTS), strict=True)
    return torch.cat([forward(dict(zip(INPUTS, piece, strict=True))) for piece in pieces])


@dataclass
class WindowReference:
    """Scores a whole accumulation window at a time, right before it is trained on (modes ``offload``, ``resident``).

    A model that is gathered from host memory for each pass is so read once per optimizer step and rank, if
    ``batch_size`` allows.
    """

    forward: TokenLosses
    """The reference's forward pass; where it is sharded, all ranks of the job call it equally often."""
    batch_size: int
    """Most blocks per forward pass."""
    share: Share = Share()

    def scored(self, batches: Iterator[Batch], window: int) -> Iterator[Batch]:
        """Yield the batches with their reference losses."""
        while drawn := list(islice(batches, window)):
            yield from map(with_reference, drawn, self._losses(drawn))

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Return the reference losses of one batch."""
        return self._losses([batch])[0]

    def close(self) -> None:
        """Nothing to do: the model goes with the process."""

    def _losses(self, window: Sequence[Batch]) -> list[torch.Tensor]:
        mine = forward_in_pieces(self.forward, self.share.take(window), self.batch_size)
        return self.share.join(mine, window)


@dataclass
class AdapterReference:
    """The model in training as its own reference: the trained adapter off, or another one on (mode ``adapter``).

    The engine's own forward pass is used, so that every stage and shard takes part as it does in training.
    """

    forward: TokenLosses
    """The engine's token losses in evaluation mode, of this replica's batch, on each of its ranks."""
    as_reference: Callable[[], AbstractContextManager[None]]
    """Within it, the model on every rank computes as the reference."""

    def scored(self, batches: Iterator[Batch], window: int) -> Iterator[Batch]:
        """Yield the batches with their reference losses."""
        while drawn := list(islice(batches, window)):
            with self.as_reference():
                losses = [self.forward(batch).float().cpu() for batch in drawn]
            yield from map(with_reference, drawn, losses)

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Return the reference losses of one batch."""
        with self.as_reference():
            return self.forward(batch).float().cpu()

    def close(self) -> None:
        """Nothing to do: there is no second model."""
