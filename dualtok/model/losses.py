"""A causal language model seen as what dualtok needs of it: one loss, or a few signals, per token.

Legend: b batch, t position, n = b * t tokens, d hidden, v vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from dualtok.errors import ConfigError
from dualtok.model.load import logit_transform
from dualtok.objective.head import IGNORED_LABEL, token_losses

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

Batch = dict[str, torch.Tensor]
HEAD_CHECK_TOKENS = 64


class TokenLossModel(nn.Module):
    """Wraps a Hugging Face causal language model; its forward gives CE(theta; t) for every token of packed blocks.

    The loss is computed inside ``forward``, so that under ZeRO-3 the ``lm_head`` is gathered by its own hooks.

    Args:
        causal_lm: a model with ``base_model`` and output embeddings that takes ``position_ids``.
        chunk_tokens: tokens whose logits are held at once; None never cuts.
    """

    def __init__(self, causal_lm: PreTrainedModel, chunk_tokens: int | None = None) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.chunk_tokens = chunk_tokens
        self._transform = logit_transform(causal_lm.config)

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Return the last hidden states [b, t, d]; positions that do not grow by one start a new document."""
        output = self.causal_lm.base_model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        )
        return output.last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., v] of hidden states [..., d] as the model itself would compute them."""
        logits = self.causal_lm.get_output_embeddings()(hidden)
        return logits if self._transform is None else self._transform(logits)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the token losses [b, t] in float32, aligned with ``labels`` and 0 where a label is -100."""
        return token_losses(
            self.hidden_states(batch),
            batch["labels"],
            self.causal_lm.get_output_embeddings(),
            chunk_tokens=self.chunk_tokens,
            transform=self._transform,
        )


class SignalModel(TokenLossModel):
    """Like :class:`TokenLossModel`, but returns the audit's signals; one block at a time, to bound memory."""

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        signals: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]],
    ) -> None:
        super().__init__(causal_lm)
        self._signals = signals

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Return the signals of every token, each [b, t]."""
        hidden = self.hidden_states(batch)
        rows = [
            self._signals(self.logits(hidden[row : row + 1]), batch["labels"][row : row + 1])
            for row in range(len(hidden))
        ]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def head_difference(model: TokenLossModel, batch: Batch) -> torch.Tensor:
    """Return how far ``model``'s token losses are from those of the Hugging Face forward pass, relative to their mean.

    Some architectures scale or cap their logits after ``lm_head``. One that does so in a way unknown to
    :func:`dualtok.model.load.logit_transform` would train on wrong losses without a sign. Reads at most the first
    :data:`HEAD_CHECK_TOKENS` tokens of the first block; under ZeRO-3 it must be called inside the engine's forward.
    """
    small = {name: batch[name][:1, :HEAD_CHECK_TOKENS] for name in ("input_ids", "position_ids", "labels")}
    own = TokenLossModel.forward(model, small)
    logits = model.causal_lm(input_ids=small["input_ids"], position_ids=small["position_ids"], use_cache=False).logits
    theirs = nn.functional.cross_entropy(
        logits[0].float(), small["labels"][0], ignore_index=IGNORED_LABEL, reduction="none"
    )
    return (own[0] - theirs).abs().max() / theirs.mean().clamp(min=1e-6)


def require_same_head(difference: float, precision: str, architecture: str) -> None:
    """Raise ConfigError when :func:`head_difference` is beyond what rounding explains."""
    tolerance = 1e-4 if precision == "fp32" else 5e-2
    if not difference <= tolerance:
        raise ConfigError(
            f"{architecture}: its logits differ from lm_head(hidden states) by {difference:.2g} (relative, allowed "
            f"{tolerance}); this architecture changes its logits in a way that dualtok does not know"
        )
