"""From hidden states to one loss per token, without ever holding the logits of all tokens.

Legend: b batch, t position, n = b * t tokens, c tokens of a chunk, d hidden, v vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dualtok.objective.chunked_cross_entropy import (
    AS_THEY_ARE,
    IGNORED_LABEL,
    LinearCrossEntropy,
    LogitScaling,
    chunk_rows,
    default_memory_mib,
    linear_cross_entropy,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["IGNORED_LABEL", "LossHead", "chunked_token_losses", "token_losses"]


class LossHead(nn.Linear):
    """A model's output layer that gives logits, or with labels token losses.

    It takes over the parameters themselves of an existing layer, so that tied embeddings stay tied and names stay as
    they are, and it has to replace that layer in the model: the weight is then used inside this module's own forward
    and backward pass, where ZeRO-3 has gathered it.

    Args:
        layer: the output layer to replace.
        scaling: what the architecture does to its logits; honoured in the losses, not in the logits.
        kernel: computes the losses.
    """

    def __init__(
        self,
        layer: nn.Linear,
        *,
        scaling: LogitScaling = AS_THEY_ARE,
        kernel: LinearCrossEntropy = linear_cross_entropy,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)
        self.train(layer.training)
        self._scaling = scaling
        self._kernel = kernel

    @staticmethod
    def can_replace(layer: nn.Module) -> bool:
        """Whether a layer is a plain linear one: not quantized, not wrapped by an adapter."""
        return type(layer) in (nn.Linear, LossHead)

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:  # noqa: A002
        """Return logits [..., v] of hidden states [..., d], or losses [...] of labels [...], 0 where they are -100.

        Raises:
            ValueError: hidden states and labels do not have the same positions.
        """
        if labels is None:
            return super().forward(input)
        if input.shape[:-1] != labels.shape:
            raise ValueError(_disagreement(input, labels))
        weight: torch.Tensor = self.weight
        bias: torch.Tensor | None = self.bias
        if torch.is_autocast_enabled(input.device.type):  # as it would be for a linear layer
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight = input.to(dtype), weight.to(dtype)  # noqa: A001
            bias = None if bias is None else bias.to(dtype)
        losses_n = self._kernel(input.flatten(0, -2), weight, labels.flatten(), bias, scaling=self._scaling)
        return losses_n.view(labels.shape)


def _cross_entropy(logits_cv: torch.Tensor, targets_c: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each row in float32, 0 where the target is -100."""
    return nn.functional.cross_entropy(logits_cv.float(), targets_c, ignore_index=IGNORED_LABEL, reduction="none")


def token_losses(
    hidden_btd: torch.Tensor,
    labels_bt: torch.Tensor,
    output_layer: nn.Module,
    *,
    vocabulary: int,
    scaling: LogitScaling = AS_THEY_ARE,
    memory_mib: float | None = None,
) -> torch.Tensor:
    """Return CE(theta; t) of every token: from a :class:`LossHead` its own, from another output layer chunk by chunk.

    Args:
        hidden_btd: last hidden states.
        labels_bt: int64, already shifted: the token that position t predicts, or -100.
        output_layer: the model's own; it is called as a module, where ZeRO-3 has gathered its weight.
        vocabulary: v.
        scaling: what the architecture does to its logits; a :class:`LossHead` knows it already.
        memory_mib: memory for the logits of a chunk, likewise; None takes
            :func:`~dualtok.objective.chunked_cross_entropy.default_memory_mib`.

    Returns:
        [b, t] float32, 0 where the label is -100.
    """
    if isinstance(output_layer, LossHead):
        losses: torch.Tensor = output_layer(hidden_btd, labels_bt)
        return losses
    memory_mib = default_memory_mib(hidden_btd.device) if memory_mib is None else memory_mib
    size = chunk_rows(memory_mib, vocabulary, torch.float32.itemsize)
    return chunked_token_losses(hidden_btd, labels_bt, output_layer, chunk_tokens=size, scaling=scaling)


def chunked_token_losses(
    hidden_btd: torch.Tensor,
    labels_bt: torch.Tensor,
    output_layer: Callable[[torch.Tensor], torch.Tensor],
    *,
    chunk_tokens: int,
    scaling: LogitScaling = AS_THEY_ARE,
) -> torch.Tensor:
    """Return CE(theta; t) of every token from an output layer of any kind (quantized, wrapped by an adapter).

    With more than one chunk, each chunk's logits are computed, dropped, and computed again in the backward pass, which
    visits every token: slower than :class:`LossHead`, for layers that it cannot replace.

    Args:
        hidden_btd: last hidden states.
        labels_bt: int64, already shifted: the token that position t predicts, or -100.
        output_layer: module from [c, d] to logits [c, v]. Always the module itself is called, never its weight used:
            ZeRO-3 gathers the weight in the module's own hooks, tied or not.
        chunk_tokens: most tokens whose logits exist at once, >= 1.
        scaling: what the architecture does to its logits.

    Returns:
        [b, t] float32, 0 where the label is -100.

    Raises:
        ValueError: hidden states and labels disagree in [b, t], or ``chunk_tokens`` is below 1.
    """
    if hidden_btd.shape[:-1] != labels_bt.shape:
        raise ValueError(_disagreement(hidden_btd, labels_bt))
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    hidden_nd, labels_n = hidden_btd.flatten(0, -2), labels_bt.flatten()

    def chunk_losses(hidden_cd: torch.Tensor, labels_c: torch.Tensor) -> torch.Tensor:
        return _cross_entropy(scaling(output_layer(hidden_cd)), labels_c)

    # Chunks are cut by shape alone, and one without any label is not left out: under ZeRO-3 every call of the layer is
    # a collective, and a rank that skipped one because of its data would leave the others waiting for ever.
    chunks = list(zip(torch.split(hidden_nd, chunk_tokens), torch.split(labels_n, chunk_tokens), strict=True))
    if len(chunks) == 1:
        losses_n = chunk_losses(*chunks[0])
    else:
        losses_n = torch.cat([checkpoint(chunk_losses, *chunk, use_reentrant=False) for chunk in chunks])
    return losses_n.view(labels_bt.shape)


def _disagreement(hidden: torch.Tensor, labels: torch.Tensor) -> str:
    return (
        f"hidden states have shape {tuple(hidden.shape)}, labels {tuple(labels.shape)}; "
        "all but the last dimension of the hidden states must agree"
    )
