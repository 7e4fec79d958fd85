"""How much a document would change a model: the norm of its loss's gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from dualtok.data.packing import model_inputs
from dualtok.model.load import load_causal_lm
from dualtok.model.losses import TokenLossModel, check_batch, require_faithful
from dualtok.model.norms import total_norm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray


def build_gradient_norm(
    folder: Path | str, *, precision: str, device: torch.device, trust_remote_code: bool = False
) -> Callable[[NDArray[np.int64]], float]:
    """Return a function from a document's token ids to the L2 norm of the gradient of its mean loss.

    The norm is over all parameters together (tied ones once), summed in float32; the model is in evaluation mode. It
    needs memory for the gradients beside the weights, and the activations of one document.

    Args:
        folder: Hugging Face folder or hub name.
        precision: of weights and gradients, ``fp32`` or ``bf16``.
        device: where the whole model is put.
        trust_remote_code: run Python code that the model brings.
    """
    causal_lm = load_causal_lm(folder, precision=precision, trust_remote_code=trust_remote_code)
    model = TokenLossModel(causal_lm).to(device).eval()
    checked = False

    def gradient_norm(ids: NDArray[np.int64]) -> float:
        nonlocal checked
        lengths = [np.array([len(ids)], dtype=np.int32)]
        batch = {name: tensor.to(device) for name, tensor in model_inputs(ids[None].astype(np.int32), lengths).items()}
        if not checked:
            with torch.no_grad():
                require_faithful(model(check_batch(batch), check=True), precision, type(causal_lm).__name__)
            checked = True
        model.zero_grad(set_to_none=True)
        (model(batch).sum() / (len(ids) - 1)).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return float(total_norm(gradients))

    return gradient_norm
