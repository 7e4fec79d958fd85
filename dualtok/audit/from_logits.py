"""What the audit keeps of a model's logits: pure functions of them, a few numbers per token.

Legend: b batch, t position, m predicted tokens of a chunk, v vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dualtok.audit.signals import TOKEN_DTYPES
from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterator

CACHED_LOGITS = 1 << 19
"""Logits of a chunk on a host: 2 MiB in float32. Larger ones take each step of the computation through main memory."""
ACCELERATOR_LOGITS = 1 << 25
NO_PROBABILITY = -110.0
"""A logit so far below the highest that its probability is 0 in float32."""


def token_signals(
    logits_btv: torch.Tensor, labels_bt: torch.Tensor, *, chunk_tokens: int | None = None
) -> dict[str, torch.Tensor]:
    """Return the signals of every token, each [b, t] and 0 (False) where the label is -100.

    Args:
        logits_btv: logits of any float dtype; only ``chunk_tokens`` of them at a time are held in float32. The
            result does not depend on how a batch is cut.
        labels_bt: int64, already shifted: the token that position t predicts, or -100.
        chunk_tokens: tokens visited at once; None takes as many as stay in a processor's cache, or on an accelerator
            as many as keep it busy.

    Returns:
        ``log_prob``, ``mean_log_prob``, ``var_log_prob`` in float32 and ``top1`` in bool; see
        :class:`~dualtok.audit.signals.Signals`.
    """
    if logits_btv.shape[:-1] != labels_bt.shape:
        raise ValueError(f"logits {tuple(logits_btv.shape)} do not fit labels {tuple(labels_bt.shape)}")
    signals = {
        name: torch.zeros(
            labels_bt.numel(), dtype=torch.bool if name == "top1" else torch.float32, device=logits_btv.device
        )
        for name in TOKEN_DTYPES
    }
    with torch.no_grad():
        flat_logits, flat_labels = logits_btv.flatten(0, -2), labels_bt.flatten()
        # Indexing copies, so that a chunk may be overwritten.
        for chunk in _chunks(logits_btv, flat_labels, chunk_tokens):
            for name, values in _chunk_signals(flat_logits[chunk].float(), flat_labels[chunk]).items():
                signals[name][chunk] = values
    return {name: values.reshape(labels_bt.shape) for name, values in signals.items()}


def kl_from_reference(
    logits_btv: torch.Tensor,
    reference_logits_btv: torch.Tensor,
    labels_bt: torch.Tensor,
    *,
    chunk_tokens: int | None = None,
) -> dict[str, torch.Tensor]:
    """Return KL(p_reference || p) of every predicted token in nats, over the vocabulary; 0 where the label is -100.

    Args:
        logits_btv: of the audited model, any float dtype.
        reference_logits_btv: of the reference on the same batch.
        labels_bt: as in :func:`token_signals`.
        chunk_tokens: as in :func:`token_signals`.

    Returns:
        ``kl_from_reference``, [b, t] in float32. A probability that is 0 in float32 counts as e^-110, so that it stays
        finite.
    """
    if logits_btv.shape != reference_logits_btv.shape or logits_btv.shape[:-1] != labels_bt.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (logits_btv, reference_logits_btv, labels_bt))
        raise ValueError(f"logits, reference's logits and labels do not fit: {shapes}")
    divergence = torch.zeros(labels_bt.numel(), device=logits_btv.device)
    with torch.no_grad():
        ours, theirs = logits_btv.flatten(0, -2), reference_logits_btv.flatten(0, -2)
        for chunk in _chunks(logits_btv, labels_bt.flatten(), chunk_tokens):
            log_q, log_p = _log_softmax(ours[chunk].float()), _log_softmax(theirs[chunk].float())
            p = log_p.exp()
            divergence[chunk] = log_p.sub_(log_q).mul_(p).sum(dim=-1).clamp_(min=0)
    return {"kl_from_reference": divergence.reshape(labels_bt.shape)}


def _log_softmax(logits_mv: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits_mv, dim=-1).clamp_(min=NO_PROBABILITY)


def _chunks(logits: torch.Tensor, flat_labels: torch.Tensor, chunk_tokens: int | None) -> Iterator[torch.Tensor]:
    """Yield the places of the predicted tokens, so many at a time."""
    if chunk_tokens is None:
        held = CACHED_LOGITS if logits.device.type == "cpu" else ACCELERATOR_LOGITS
        chunk_tokens = max(1, held // logits.shape[-1])
    yield from torch.split((flat_labels != IGNORED_LABEL).nonzero().squeeze(1), chunk_tokens)


def _chunk_signals(z: torch.Tensor, labels_m: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the signals of a chunk's logits ``z`` [m, v] in float32, which are overwritten."""
    top = z.amax(dim=-1)
    true = z.gather(1, labels_m[:, None]).squeeze(1)
    # p log p -> 0 as p -> 0, but 0 * -inf is NaN: models mask unused rows of the vocabulary with -inf.
    z.sub_(top[:, None]).clamp_(min=NO_PROBABILITY)
    p = z.exp()  # not yet divided by its sum
    total = p.sum(dim=-1)
    mean = (p * z).sum(dim=-1) / total
    # Two passes: E[x^2] - E[x]^2 loses every digit where the model is nearly sure.
    variance = z.sub_(mean[:, None]).square_().mul_(p).sum(dim=-1) / total
    log_total = total.log()
    return {
        "log_prob": true - top - log_total,
        "top1": true >= top,
        "mean_log_prob": mean - log_total,
        "var_log_prob": variance,
    }
