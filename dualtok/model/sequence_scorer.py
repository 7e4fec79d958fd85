"""A model asked about sequences of tokens: what attacks need that run it again, over changed documents.

Legend: b batch, t position, m tokens of a chunk, v vocabulary, c candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dualtok.data.packing import PADDING_ID, model_inputs, pack
from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Ids = NDArray[np.int64]
    Answer = dict[str, NDArray[np.generic]]

CHUNK_TOKENS = 256
"""Tokens whose log-probabilities over the vocabulary exist at once in float32."""


class SequenceSignals:
    """What the scorer keeps of the logits: the loss of each token and, where asked for, likely tokens in its place.

    Args:
        vocabulary: ids of the tokenizer; a model may have more rows, which no text can hold.
        special: ids that stand for no text.
    """

    def __init__(self, vocabulary: int, special: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._special = list(special)
        self.candidates = 0
        """Other tokens to keep per position."""

    def __call__(self, logits_btv: torch.Tensor, labels_bt: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``loss`` [b, t], 0 where there is no label, and of the likeliest tokens other than the label
        ``other`` (ids) and ``weight`` (their probabilities given that it is one of them), each [b, t, c]."""
        chunks = zip(
            torch.split(logits_btv.flatten(0, 1), CHUNK_TOKENS),
            torch.split(labels_bt.flatten(), CHUNK_TOKENS),
            strict=True,
        )
        parts = [self._chunk(logits_mv.float(), labels_m) for logits_mv, labels_m in chunks]
        together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: values.reshape(*labels_bt.shape, *values.shape[1:]) for name, values in together.items()}

    def _chunk(self, logits_mv: torch.Tensor, labels_m: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = torch.nn.functional.cross_entropy(logits_mv, labels_m, ignore_index=IGNORED_LABEL, reduction="none")
        if not self.candidates:
            return {"loss": loss}
        others = logits_mv[:, : self._vocabulary].clone()
        others[:, self._special] = -torch.inf
        others.scatter_(1, labels_m.clamp(min=0)[:, None], -torch.inf)
        top = torch.topk(others, min(self.candidates, others.shape[1]), dim=1)
        return {"loss": loss, "other": top.indices, "weight": torch.softmax(top.values, dim=1)}


class SequenceScorer:
    """Packs sequences into blocks, runs the model over them and takes its answers apart again.

    On several ranks every method is to be called by all of them together, each with its own sequences or none: under
    ZeRO-3 each call of the model is a collective.

    Args:
        forward: the model, from a batch to what ``signals`` gives, each [b, t, ...].
        signals: what ``forward`` keeps.
        block_length: tokens per block, which no sequence may exceed.
        batch_size: blocks per call.
        most: function from this rank's number of calls to the largest of all ranks.
    """

    def __init__(
        self,
        forward: Callable[[dict[str, torch.Tensor]], Any],
        signals: SequenceSignals,
        *,
        block_length: int,
        batch_size: int,
        most: Callable[[int], int] = int,
    ) -> None:
        self._forward, self._signals = forward, signals
        self._block_length, self._batch_size, self._most = block_length, batch_size, most

    def losses(self, sequences: Sequence[Ids]) -> list[NDArray[np.float64]]:
        """Return -log p of each token after a sequence's first, in nats, by itself in its context: [length - 1]."""
        self._signals.candidates = 0
        return [answer["loss"].astype(np.float64) for answer in self._answers(sequences)]

    def candidates(self, sequences: Sequence[Ids], count: int) -> list[Answer]:
        """Return for each token after a sequence's first what the model expected in its place.

        Returns:
            Of each sequence ``loss`` [length - 1], and of the ``count`` likeliest other tokens ``other`` (ids) and
            ``weight`` (probabilities, summing to 1), both [length - 1, count].
        """
        self._signals.candidates = count
        return self._answers(sequences)

    @torch.no_grad()
    def _answers(self, sequences: Sequence[Ids]) -> list[Answer]:
        too_long = max(map(len, sequences), default=0)
        if too_long > self._block_length:
            raise ValueError(f"a sequence of {too_long} tokens does not fit a block of {self._block_length}")
        rows = pack([len(sequence) for sequence in sequences], self._block_length)
        answers: list[Answer] = [{} for _ in sequences]
        size = self._batch_size
        for call in range(self._most(-(-len(rows) // size))):
            mine = rows[call * size : (call + 1) * size]
            ids = np.full((size, self._block_length), PADDING_ID, dtype=np.int32)
            lengths = [np.zeros(0, dtype=np.int32)] * size
            for row, members in enumerate(mine):
                together = np.concatenate([sequences[member] for member in members])
                ids[row, : len(together)] = together
                lengths[row] = np.array([len(sequences[member]) for member in members], dtype=np.int32)
            signals = {name: values.cpu().numpy() for name, values in self._forward(model_inputs(ids, lengths)).items()}
            for row, members in enumerate(mine):
                column = 0
                for member in members:
                    length = len(sequences[member])
                    own = slice(column, column + length - 1)
                    answers[member] = {name: values[row, own].copy() for name, values in signals.items()}
                    column += length
        return answers
