"""Operations per token, as model FLOP utilization counts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dualtok.plan.shape import ModelShape


def flops_per_token(shape: ModelShape, length: int, *, frozen: bool = False) -> int:
    """Return the floating-point operations that training on one token needs: 6 N + 12 L h t.

    Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, appendix B). N: parameters that multiply activations, that is all
    but the embeddings, with the head counted even where it is tied to them; L layers, h hidden, t tokens of a block:
    attention as if every token attended to the whole block, and heads as wide as h together. Recomputed activations,
    the reference model and the optimizer do not count. Mixtures of experts are counted as if every expert saw every
    token.

    Args:
        shape: of the model.
        length: tokens per block.
        frozen: whether the weights are frozen under small adapters: their own gradients, 2 of the 6, are not computed.
    """
    matrices = sum(map(sum, shape.layers)) + sum(shape.last) + shape.tied
    return (4 if frozen else 6) * matrices + 12 * len(shape.layers) * shape.hidden * length
