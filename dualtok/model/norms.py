"""Norms of host-side tensors that are right: torch adds up a long float32 vector on a CPU in float32.

With torch 2.13 the 2-norm of 64 million elements comes out .5 % too small there, and ``get_total_norm`` and
``clip_grad_norm_`` inherit that. Gradients that are clipped by such a norm stay longer than they may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

CHUNK = 1 << 20
"""Elements that are held in float64 at one time."""


@torch.no_grad()
def total_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the 2-norm of tensors of any shapes taken as one vector: float32, on their device; 0 of none.

    What lies in host memory is added up in float64, chunk by chunk; accelerators add up in a tree.
    """
    squares = [_square(tensor) for tensor in tensors]
    return torch.stack(squares).sum().sqrt().float() if squares else torch.zeros(())


@torch.no_grad()
def row_norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the 2-norms [n] of the rows of a tensor [n, ...], each taken as one vector, in its dtype."""
    if not len(rows):
        return rows.new_zeros(0)
    return torch.stack([_square(row) for row in rows]).sqrt().to(rows.dtype)


def _square(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares, float64 (float32 on accelerators, some of which have no float64)."""
    if tensor.device.type != "cpu":
        return torch.linalg.vector_norm(tensor, dtype=torch.float32).square()
    square = torch.zeros((), dtype=torch.float64)
    for chunk in tensor.detach().flatten().split(CHUNK):
        double = chunk.double()
        square += torch.dot(double, double)
    return square
