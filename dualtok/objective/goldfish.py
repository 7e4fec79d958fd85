"""The Goldfish mask: some tokens of every passage are never learned at all.

Legend: b batch, t position.
"""

from __future__ import annotations

import torch

from dualtok.objective.head import IGNORED_LABEL
from dualtok.objective.settings import GoldfishConfig

# Odd constants of a 64-bit multiplicative hash (the fraction of the golden ratio; the finaliser of MurmurHash3),
# written as signed integers: int64 tensors multiply modulo 2^64.
_HASH_FACTOR = -7046029254386353131  # 0x9E3779B97F4A7C15
_HASH_MIX = -49064778989728563  # 0xFF51AFD7ED558CCD


def goldfish_mask(
    input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor, *, drop_every: int = 4, context: int = 13
) -> torch.Tensor:
    """Return which tokens stay in the Goldfish loss (Hans et al. 2024, arXiv 2406.10209).

    The token that ``labels[t]`` names is dropped when a hash of the ``context`` tokens before it, ``input_ids`` up to
    and including t, is a multiple of ``drop_every``. The hash sees nothing else, so a passage loses the same tokens in
    every epoch, in every document that repeats it, and wherever it is packed: what is dropped is never learned at all.
    A random choice would let each token through in some epoch. With fewer than ``context`` tokens before it in its
    piece a token is kept: the hash would cover another document or a fixed document start.

    Args:
        input_ids: [b, t] int64.
        position_ids: [b, t] int64, from 0 at the start of each piece.
        labels: [b, t] int64, already shifted; -100 is never kept.
        drop_every: one token in so many is dropped, on average; at least 2.
        context: tokens that are hashed; at least 1.

    Returns:
        Bool [b, t], aligned with ``labels``.

    Raises:
        ValueError: the shapes differ, or a setting is too small.
    """
    if not input_ids.shape == position_ids.shape == labels.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, position_ids {tuple(position_ids.shape)}, "
            f"labels {tuple(labels.shape)}; they must agree"
        )
    GoldfishConfig(drop_every, context)
    hashed = torch.zeros_like(input_ids)
    for back in range(context - 1, -1, -1):
        # What rolls in from the other end of the row is never used: position_ids tells that the window is incomplete.
        hashed = (hashed + torch.roll(input_ids, back, dims=-1) + 1) * _HASH_FACTOR
        # The low bits of a product depend on the low bits of its factors alone; fold the high ones in.
        hashed = (hashed ^ _shift_right(hashed, 29)) * _HASH_MIX
    dropped = (_shift_right(hashed, 16) % drop_every == 0) & (position_ids + 1 >= context)
    return (labels != IGNORED_LABEL) & ~dropped


def _shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return a logical right shift of int64: torch's own is arithmetic and would pull in copies of the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
