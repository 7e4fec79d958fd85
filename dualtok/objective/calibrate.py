"""The calibrated loss s(t): what the model in training knows beyond a model that never saw the document."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def calibrated_loss(token_loss: torch.Tensor, reference_loss: torch.Tensor) -> torch.Tensor:
    """Return s(t) = CE(theta; t) - CE(theta_ref; t), detached, in float32 (DuoLearn, arXiv 2502.19726).

    High: hard, the reference predicts the token better. Low: memorized, the model in training predicts it better.

    Args:
        token_loss: losses of the model in training, nats, any shape, any float dtype.
        reference_loss: losses of the frozen reference, nats, same shape.

    Returns:
        float32, same shape, without gradient. NaN or infinite where the losses are.

    Raises:
        ValueError: the shapes differ.
    """
    if token_loss.shape != reference_loss.shape:
        raise ValueError(
            f"token_loss has shape {tuple(token_loss.shape)}, reference_loss {tuple(reference_loss.shape)}; "
            "they must agree"
        )
    return token_loss.detach().float() - reference_loss.detach().float()
