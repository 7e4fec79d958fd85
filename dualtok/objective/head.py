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
"""(logits [c, v], targets [c] with -100 = ignored) -> losses [c]. Its backward pass must honour a different, also
negative, incoming gradient for each token."""

LogitTransform = Callable[[torch.Tensor], torch.Tensor]
"""What some architectures do to their logits after ``lm_head``: a scale or a soft cap."""


def torch_cross_entropy(logits_cv: torch.Tensor, targets_c: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each row in float32, 0 where the target is -100: the kernel that works everywhere."""
    return nn.functional.cross_entropy(logits_cv.float(), targets_c, ignore_index=IGNORED_LABEL, reduction="none")


def token_losses(
    hidden_btd: torch.Tensor,
    labels_bt: torch.Tensor,
    lm_head: nn.Module,
    *,
    chunk_tokens: int | None = None,
    cross_entropy: CrossEntropy | None = None,
    transform: LogitTransform | None = None,
) -> torch.Tensor:
    """Return CE(theta; t) of every token.

    With more than one chunk, each chunk's logits are computed, dropped, and computed again in the backward pass: the
    logits of at most one chunk exist at a time, at the price of a second pass through ``lm_head``.

    Args:
        hidden_btd: last hidden states.
        labels_bt: int64, already shifted: the token that position t predicts, or -100.
        lm_head: module from [c, d] to logits [c, v]. Always the module itself is called, never its weight used: ZeRO-3
            gathers the weight in the module's own hooks, tied or not.
        chunk_tokens: most tokens whose logits exist at once, >= 1; None never cuts.
        cross_entropy: the kernel; None takes :func:`torch_cross_entropy`.
        transform: applied to the logits of each chunk before the kernel.

    Returns:
        [b, t] float32, 0 where the label is -100.

    Raises:
        ValueError: hidden states and labels disagree in [b, t], or ``chunk_tokens`` is below 1.
    """
    if hidden_btd.shape[:-1] != labels_bt.shape:
        raise ValueError(
            f"hidden states have shape {tuple(hidden_btd.shape)}, labels {tuple(labels_bt.shape)}; "
            "all but the last dimension of the hidden states must agree"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, or None for one piece; got {chunk_tokens}")
    kernel = torch_cross_entropy if cross_entropy is None else cross_entropy
    hidden_nd, labels_n = hidden_btd.flatten(0, -2), labels_bt.flatten()

    def chunk_losses(hidden_cd: torch.Tensor, labels_c: torch.Tensor) -> torch.Tensor:
        logits_cv: torch.Tensor = lm_head(hidden_cd)
        return kernel(logits_cv if transform is None else transform(logits_cv), labels_c).float()

    size = chunk_tokens or max(len(labels_n), 1)
    chunks = list(zip(torch.split(hidden_nd, size), torch.split(labels_n, size), strict=True))
    # Chunks are cut by shape alone, and one without any label is not left out: under ZeRO-3 every call of lm_head is a
    # collective, and a rank that skipped one because of its data would leave the others waiting for ever.
    if len(chunks) == 1:
        losses_n = chunk_losses(*chunks[0])
    else:
        losses_n = torch.cat([checkpoint(chunk_losses, *chunk, use_reentrant=False) for chunk in chunks])
    return torch.where(labels_n != IGNORED_LABEL, losses_n, 0.0).view(labels_bt.shape)
