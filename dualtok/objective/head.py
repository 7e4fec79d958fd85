"""From hidden states to one loss per token, without ever holding the logits of all tokens.

Legend: b batch, t position, n = b * t tokens, c tokens of a chunk, d hidden, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORED_LABEL = -100
CrossEntropy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [c, v], targets [c], -100 = ignored) -> losses [c] in float32, 0 where ignored."""


def torch_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each row in float32: the kernel that works everywhere."""
    return nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED_LABEL, reduction="none")


def token_losses(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    lm_head: nn.Module,
    *,
    chunk_tokens: int | None = None,
    cross_entropy: CrossEntropy = torch_cross_entropy,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return CE(theta; t) of every token.

    With more than one chunk, each chunk's logits are computed, dropped, and computed again in the backward pass.

    Args:
        hidden: last hidden states [b, t, d].
        labels: [b, t] int64, already shifted: the token that position t predicts, or -100.
        lm_head: module from [c, d] to logits [c, v]. Always the module itself is called, never its weight used: ZeRO-3 gathers
            the weight in the module's own hooks, tied or not.
        chunk_tokens: most tokens whose logits exist at once; None cuts nothing.
        cross_entropy: the kernel.
        transform: what the architecture does to its logits after ``lm_head``.

    Returns:
        [b, t] float32, 0 where the label is -100.
    """
    flat_hidden, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)

    def chunk_losses(hidden_cd: torch.Tensor, labels_c: torch.Tensor) -> torch.Tensor:
        logits = lm_head(hidden_cd)
        return cross_entropy(logits if transform is None else transform(logits), labels_c)

    size = chunk_tokens or max(len(flat_labels), 1)
    pieces = list(zip(flat_hidden.split(size), flat_labels.split(size), strict=True))
    if len(pieces) == 1:
        return chunk_losses(*pieces[0]).view(labels.shape)
    # Chunks are cut by position and none is left out for having no labels: under ZeRO-3 every rank must call lm_head equally
    # often, or the others wait for it.
    losses = [checkpoint(chunk_losses, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat(losses).view(labels.shape)
