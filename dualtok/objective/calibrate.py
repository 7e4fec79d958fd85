"""The calibrated loss s(t), which tells what the model knows beyond a model that never saw the document."""

from __future__ import annotations

import torch


def calibrated_loss(token_loss: torch.Tensor, reference_loss: torch.Tensor) -> torch.Tensor:
    """Return s(t) = CE(theta; t) - CE(theta_ref; t), detached, in float32 (DuoLearn, arXiv 2502.19726).

    High: hard, the reference knows the token better. Low: memorised, the model in training knows it better.

    Args:
        token_loss: losses of the model in training, any shape, any float dtype.
        reference_loss: losses of the frozen reference, same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if token_loss.shape != reference_loss.shape:
        raise ValueError(
            f"token_loss has shape {tuple(token_loss.shape)}, reference_loss {tuple(reference_loss.shape)}; they must agree"
        )
    return token_loss.detach().float() - reference_loss.detach().float()
