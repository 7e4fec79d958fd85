"""Optional GPU kernels for the token losses, each compared with the formula before it may be used.

Some released kernels apply one factor to all tokens where each token has its own, and the dual loss would then learn
what it should unlearn. :func:`check_backend` finds that out on a small problem when the run starts. The adapters below
follow the packages' sources (cut-cross-entropy 25.1.1, liger-kernel 0.8.5). Both have passed the check on a GPU
in bf16 (docs/results/gpu.md), Liger's also in fp32, and in Triton's interpreter on a CPU, without a soft cap; the
other's do not run there.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from dualtok.errors import ConfigError
from dualtok.model.load import DTYPES, logit_scaling
from dualtok.objective.chunked_cross_entropy import AS_THEY_ARE, IGNORED_LABEL, linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dualtok.objective.chunked_cross_entropy import LinearCrossEntropy, LogitScaling

# Imported where they are used, for they need not be installed or wanted: cut_cross_entropy, liger_kernel.

PACKAGES = {"cut_cross_entropy": "cut-cross-entropy", "liger": "liger-kernel"}
"""Name of a backend -> the package to install."""
MODULES = {"cut_cross_entropy": "cut_cross_entropy", "liger": "liger_kernel"}
"""Name of a backend -> the module that must be there."""

FALLBACK = "use loss_backend: torch"
CHECK_TOKENS, CHECK_HIDDEN, CHECK_VOCABULARY = 96, 64, 512
TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 3e-2}
"""Largest relative error, by norm, that is rounding: kernels multiply float32 with 10-bit mantissas (TF32)."""


def load_backend(
    name: str, causal_lm: PreTrainedModel, device: torch.device, precision: str
) -> LinearCrossEntropy | None:
    """Return a checked kernel; None for ``torch``, dualtok's own.

    Args:
        name: ``torch``, ``cut_cross_entropy`` or ``liger``.
        causal_lm: the model, whose logits' scaling and bias the kernel is checked with.
        device: where the model trains.
        precision: ``fp32`` or ``bf16``.

    Raises:
        ConfigError: there is no GPU, the package is not installed, or its values or gradients are wrong.
    """
    if name == "torch":
        return None
    if device.type == "cpu":
        raise ConfigError(
            f"train.loss_backend: {name} needs a GPU, and this job runs on the CPU; use loss_backend: torch"
        )
    if find_spec(MODULES[name]) is None:
        raise ConfigError(
            f"train.loss_backend: {name} is not installed; run `pip install {PACKAGES[name]}`, or {FALLBACK}"
        )
    kernel = KERNELS[name]
    check_backend(
        name,
        kernel,
        device,
        DTYPES[precision],
        scaling=logit_scaling(causal_lm.config),
        bias=getattr(causal_lm.get_output_embeddings(), "bias", None) is not None,
    )
    return kernel


def check_backend(
    name: str,
    kernel: LinearCrossEntropy,
    device: torch.device,
    dtype: torch.dtype,
    *,
    scaling: LogitScaling = AS_THEY_ARE,
    bias: bool = False,
) -> None:
    """Compare a kernel's losses and weighted gradients with the formula in float64.

    The tokens' weights differ, some are negative, some 0, and some tokens have no label, as in the dual loss.

    Raises:
        ConfigError: the kernel fails or errs by more than :data:`TOLERANCES`; names the backend and what is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    problem = {
        "gradient of the hidden states": torch.randn(CHECK_TOKENS, CHECK_HIDDEN, generator=generator),
        "gradient of the weight": torch.randn(CHECK_VOCABULARY, CHECK_HIDDEN, generator=generator) / 4,
        "gradient of the bias": torch.randn(CHECK_VOCABULARY, generator=generator),
    }
    if not bias:
        del problem["gradient of the bias"]
    labels = torch.randint(0, CHECK_VOCABULARY, (CHECK_TOKENS,), generator=generator)
    labels[::7] = IGNORED_LABEL
    factors = torch.randn(CHECK_TOKENS, generator=generator)
    factors[::5] = 0.0

    def run(kernel: LinearCrossEntropy, device: torch.device, precision: torch.dtype) -> dict[str, torch.Tensor]:
        # Rounded to the precision of training first, so that the formula sees the numbers that the kernel sees.
        leaves = [part.to(dtype).to(device, precision).requires_grad_() for part in problem.values()]
        hidden, weight, *rest = leaves
        losses = kernel(hidden, weight, labels.to(device), *rest, scaling=scaling)
        gradients = torch.autograd.grad((losses * factors.to(losses)).sum(), leaves)
        found = dict(zip(("losses", *problem), (losses, *gradients), strict=True))
        return {what: tensor.detach().cpu().double() for what, tensor in found.items()}

    expected = run(linear_cross_entropy, torch.device("cpu"), torch.float64)
    try:
        found = run(kernel, device, dtype)
    except Exception as error:  # whatever a third party's kernel raises, the user needs the way out
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(f"train.loss_backend: {name} failed its check ({reason}); {FALLBACK}") from error
    for what, ours in expected.items():
        theirs = found[what]
        size = float((theirs - ours).norm() / ours.norm()) if theirs.shape == ours.shape else float("inf")
        if not size <= TOLERANCES[dtype]:
            raise ConfigError(
                f"train.loss_backend: {name} errs in the {what} when tokens have different weights (relative error "
                f"{size:.2g}, allowed {TOLERANCES[dtype]}); {FALLBACK}"
            )


def _cut_cross_entropy(
    hidden_nd: torch.Tensor,
    weight_vd: torch.Tensor,
    labels_n: torch.Tensor,
    bias_v: torch.Tensor | None = None,
    *,
    scaling: LogitScaling = AS_THEY_ARE,
) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut

    if bias_v is not None:
        raise ConfigError(
            "train.loss_backend: cut_cross_entropy knows no bias in the output layer; use loss_backend: torch"
        )
    # filter_eps would drop small gradients; a factor of the logits is one of the hidden states.
    losses: torch.Tensor = cut(
        hidden_nd * scaling.factor,
        weight_vd,
        labels_n,
        IGNORED_LABEL,
        softcap=scaling.softcap,
        reduction="none",
        filter_eps=None,
    )
    return losses.float()


def _liger(
    hidden_nd: torch.Tensor,
    weight_vd: torch.Tensor,
    labels_n: torch.Tensor,
    bias_v: torch.Tensor | None = None,
    *,
    scaling: LogitScaling = AS_THEY_ARE,
) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    bias = None if bias_v is None else bias_v * scaling.factor
    losses: torch.Tensor = liger_fused_linear_cross_entropy(
        hidden_nd * scaling.factor,
        weight_vd,
        labels_n,
        bias=bias,
        ignore_index=IGNORED_LABEL,
        reduction="none",
        softcap=scaling.softcap,
        accum_dtype=torch.float32,
    )
    return losses.float()


KERNELS: dict[str, LinearCrossEntropy] = {"cut_cross_entropy": _cut_cross_entropy, "liger": _liger}
"""Name of a backend -> its kernel, not yet checked."""
