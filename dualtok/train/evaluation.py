"""Evaluation while training: validation loss, the member/validation loss gap, and the Ref attack's AUC.

Only ``validation`` and blocks of the training split are read; ``held_out`` is opened by the final audit alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dualtok.errors import DataError
from dualtok.objective.head import IGNORED_LABEL
from dualtok.reference.live import with_reference

if TYPE_CHECKING:
    import torch

    from dualtok.data.packing import Segment
    from dualtok.data.stream.mixture import TrainingStream
    from dualtok.reference.live import LiveReference
    from dualtok.train.engines.base import TrainingEngine


@dataclass(frozen=True)
class DocumentLosses:
    """Summed losses of documents; ``reference`` is NaN where the stream has no reference losses."""

    document: np.ndarray
    """Document ids [n], ascending."""
    loss: np.ndarray
    """Sum of token losses [n], nats."""
    reference: np.ndarray
    """Sum of the reference's token losses [n], nats."""
    tokens: np.ndarray
    """Predicted tokens [n]."""

    @property
    def mean_loss(self) -> float:
        """Token-weighted mean loss in nats."""
        return float(self.loss.sum() / self.tokens.sum())

    @property
    def calibrated(self) -> np.ndarray:
        """Mean of s(t) per document [n]: low means memorized."""
        return np.asarray((self.loss - self.reference) / self.tokens)


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation measured."""

    step: int
    validation_loss: float
    """Mean token loss on ``validation``, nats."""
    member_loss: float
    """Mean token loss on as many blocks of the training split, evenly spaced, nats."""
    ref_auc: float | None
    """AUC of the Ref attack between members and validation documents, with the run's own reference; None without."""

    @property
    def perplexity(self) -> float:
        """Perplexity on ``validation``."""
        return math.exp(min(self.validation_loss, 700.0))

    @property
    def gap(self) -> float:
        """Validation loss minus member loss, nats; grows with memorization."""
        return self.validation_loss - self.member_loss


def evaluate(
    engine: TrainingEngine,
    members: TrainingStream,
    validation: TrainingStream,
    *,
    blocks: int,
    batch_size: int,
    step: int,
    reference: LiveReference | None = None,
) -> Evaluation:
    """Evaluate on at most ``blocks`` blocks of each stream; every rank takes part and gets the same result.

    ``reference`` scores the blocks where the streams carry no reference losses.
    """
    seen = document_losses(engine, members, blocks, batch_size, reference)
    unseen = document_losses(engine, validation, blocks, batch_size, reference)
    known = np.isfinite(seen.reference).all() and np.isfinite(unseen.reference).all()
    auc = None
    if known:
        # scipy and scikit-learn take seconds to load, on every rank; a run without reference losses needs neither.
        from dualtok.audit.statistics.metrics import roc_auc

        auc = float(roc_auc(-seen.calibrated, -unseen.calibrated))
    return Evaluation(step, unseen.mean_loss, seen.mean_loss, auc)


def document_losses(
    engine: TrainingEngine, stream: TrainingStream, blocks: int, batch_size: int, reference: LiveReference | None = None
) -> DocumentLosses:
    """Sum token losses per document over the first ``blocks`` blocks of a stream, shared by all replicas."""
    ranks = engine.layout.data_parallel
    pieces = []
    for batch, segments in stream.sequential(batch_size, ranks.rank, ranks.world_size, max_blocks=blocks):
        if reference is not None:
            batch = with_reference(batch, reference.token_losses(batch))  # noqa: PLW2901
        losses = engine.token_losses(batch).cpu().double()
        pieces.append(_document_sums(losses, batch, segments))
    mine = np.concatenate(pieces) if pieces else np.zeros((0, 4))
    everyone = np.concatenate(ranks.gather_objects(mine))
    everyone = everyone[everyone[:, 3] > 0]
    if len(everyone) == 0:
        raise DataError(f"{stream.split}: no token to predict in its blocks; make the split larger")
    documents, index = np.unique(everyone[:, 0], return_inverse=True)
    sums = [np.bincount(index, weights=everyone[:, column]) for column in (1, 2, 3)]
    return DocumentLosses(documents.astype(np.int64), *sums)


def _document_sums(losses: torch.Tensor, batch: dict[str, torch.Tensor], segments: list[list[Segment]]) -> np.ndarray:
    """Return one row (document, loss, reference loss, tokens) per piece of the batch's blocks."""
    predicted = (batch["labels"] != IGNORED_LABEL).double()
    reference = batch.get("reference_loss")
    columns = [
        losses * predicted,
        predicted * math.nan if reference is None else reference.double() * predicted,
        predicted,
    ]
    # A running sum per row turns the sum over each piece into a difference of two columns.
    running = [np.concatenate([np.zeros((len(c), 1)), c.cumsum(1).numpy()], axis=1) for c in columns]
    rows = []
    for row, pieces in enumerate(segments):
        column = 0
        for document, _start, length in pieces:
            ends = (row, column + length), (row, column)
            rows.append([document, *(float(total[ends[0]] - total[ends[1]]) for total in running)])
            column += length
    return np.array(rows).reshape(-1, 4)
