"""What the audit keeps of a model's logits: pure functions of them, a few numbers per token.

Legend: b batch, t position, m predicted tokens of a chunk, v vocabulary.
"""

from __future__ import annotations

import torch

from dualtok.audit.signals.signals import TOKEN_DTYPES
from dualtok.objective.head import IGNORED_LABEL

CACHED_LOGITS = 1 << 19
"""Logits of a chunk on a host: 2 MiB in float32. Larger ones take each step of the computation through main memory."""
ACCELERATOR_LOGITS = 1 << 25
NO_PROBABILITY = -110.0
"""A logit so far below the highest that its probability is 0 in float32."""


def token_signals(
    logits_btv: torch.Tensor, labels_bt: torch.Tensor, *, chunk_tokens: int | None = None
) -> dict[str, torch.Tensor]:
    """Return the signals of every token, each [b, t] and 0 where the label is -100.

    Args:
        logits_btv: logits of any float dtype; only ``chunk_tokens`` of them at a time are held in float32. The
            result does not depend on how a batch is cut.
        labels_bt: int64, already shifted: the token that position t predicts, or -100.
        chunk_tokens: tokens visited at once; None takes as many as stay in a processor's cache, or on an accelerator
            as many as keep it busy.

    Returns:
        ``log_prob``, ``mean_log_prob``, ``var_log_prob`` in float32 and ``rank`` in int32; see
        :class:`~dualtok.audit.signals.signals.Signals`.

    Raises:
        ValueError: logits and labels do not have the same positions.
    """
    if logits_btv.shape[:-1] != labels_bt.shape:
        raise ValueError(f"logits {tuple(logits_btv.shape)} do not fit labels {tuple(labels_bt.shape)}")
    flat_logits, flat_labels = logits_btv.flatten(0, -2), labels_bt.flatten()
    signals = {
        name: torch.zeros(
            len(flat_labels), dtype=torch.int32 if name == "rank" else torch.float32, device=logits_btv.device
        )
        for name in TOKEN_DTYPES
    }
    with torch.no_grad():
        chunks = _chunks(flat_logits, flat_labels, chunk_tokens)
        longest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        buffers = torch.empty(3, longest, flat_logits.shape[-1], device=logits_btv.device)
        for chunk in chunks:
            found = _chunk_signals(
                flat_logits[chunk], flat_labels[chunk].clamp(min=0), buffers[:, : chunk.stop - chunk.start]
            )
            for name, values in found.items():
                signals[name][chunk] = values.masked_fill_(flat_labels[chunk] == IGNORED_LABEL, 0)
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

    Raises:
        ValueError: both models' logits and the labels do not fit each other.
    """
    if logits_btv.shape != reference_logits_btv.shape or logits_btv.shape[:-1] != labels_bt.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (logits_btv, reference_logits_btv, labels_bt))
        raise ValueError(f"logits, reference's logits and labels do not fit: {shapes}")
    ours, theirs, labels = logits_btv.flatten(0, -2), reference_logits_btv.flatten(0, -2), labels_bt.flatten()
    divergence = torch.zeros(len(labels), device=logits_btv.device)
    with torch.no_grad():
        for chunk in _chunks(ours, labels, chunk_tokens):
            log_q, log_p = _log_softmax(ours[chunk]), _log_softmax(theirs[chunk])
            p = log_p.exp()
            divergence[chunk] = log_p.sub_(log_q).mul_(p).sum(dim=-1).clamp_(min=0)
    return {"kl_from_reference": divergence.masked_fill_(labels == IGNORED_LABEL, 0).reshape(labels_bt.shape)}


def _log_softmax(logits_mv: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits_mv.float(), dim=-1).clamp_(min=NO_PROBABILITY)


def _chunks(logits_nv: torch.Tensor, labels_n: torch.Tensor, chunk_tokens: int | None) -> list[slice]:
    """Return where there is anything to predict, so many positions at a time."""
    if chunk_tokens is None:
        held = CACHED_LOGITS if logits_nv.device.type == "cpu" else ACCELERATOR_LOGITS
        chunk_tokens = max(1, held // logits_nv.shape[-1])
    asked, n = (labels_n != IGNORED_LABEL).tolist(), len(labels_n)
    slices = (slice(first, min(first + chunk_tokens, n)) for first in range(0, n, chunk_tokens))
    return [here for here in slices if any(asked[here])]


def _chunk_signals(logits_mv: torch.Tensor, labels_m: torch.Tensor, buffers: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the signals of some positions; ``buffers`` [3, m, v] in float32 is overwritten.

    Memory that is given again and again stays in the cache. New memory for each step took a quarter longer.
    """
    z, p, product = buffers
    exact = logits_mv if logits_mv.dtype == torch.float32 else z.copy_(logits_mv)
    top = exact.amax(dim=-1)
    true = exact.gather(1, labels_m[:, None]).squeeze(1)
    # Ones and zeros as float32 are compared and summed by vector instructions: a fifth of what a sum of Booleans takes.
    # A sum of fewer than 2^24 ones is exact.
    rank = torch.gt(exact, true[:, None], out=product).sum(dim=-1)
    # p log p -> 0 as p -> 0, but 0 * -inf is NaN: models mask unused rows of the vocabulary with -inf.
    torch.sub(exact, top[:, None], out=z).clamp_(min=NO_PROBABILITY)
    torch.exp(z, out=p)  # not yet divided by its sum
    total = p.sum(dim=-1)
    mean = torch.mul(p, z, out=product).sum(dim=-1) / total
    # Two passes: E[x^2] - E[x]^2 loses every digit where the model is nearly sure.
    variance = z.sub_(mean[:, None]).square_().mul_(p).sum(dim=-1) / total
    log_total = total.log()
    return {
        "log_prob": true - top - log_total,
        "rank": rank,
        "mean_log_prob": mean - log_total,
        "var_log_prob": variance,
    }
