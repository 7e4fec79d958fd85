"""Foreign kernels are compared with the formula before they may be used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dualtok.errors import ConfigError
from dualtok.model.loss_backends import check_backend, load_backend
from dualtok.objective import LogitScaling

CPU = torch.device("cpu")


def eager(hidden: Any, weight: Any, labels: Any, bias: Any = None, *, scaling: Any = LogitScaling()) -> torch.Tensor:  # noqa: B008
    logits = scaling(torch.nn.functional.linear(hidden, weight, bias)).float()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


class OneFactor(torch.autograd.Function):
    """The fault of several released kernels: gradients are computed for equal tokens, then scaled by one number."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, labels: Any) -> torch.Tensor:
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_() for part in (hidden, weight)]
            losses = eager(*leaves, labels)
            ctx.save_for_backward(*torch.autograd.grad(losses.sum(), leaves))
        return losses.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        into_hidden, into_weight = ctx.saved_tensors
        return into_hidden * gradient[:, None], into_weight * gradient.mean(), None


def one_factor(hidden: Any, weight: Any, labels: Any, bias: Any = None, **_: Any) -> torch.Tensor:
    return OneFactor.apply(hidden, weight, labels)


def mean_of_all(hidden: Any, weight: Any, labels: Any, bias: Any = None, **_: Any) -> torch.Tensor:
    return eager(hidden, weight, labels).mean()


def no_negative(hidden: Any, weight: Any, labels: Any, bias: Any = None, **_: Any) -> torch.Tensor:
    losses = eager(hidden, weight, labels)
    losses.register_hook(lambda gradient: gradient.clamp(min=0))
    return losses


def crash(*_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [LogitScaling(), LogitScaling(0.5, 4.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_right_kernel_passes(dtype: torch.dtype, scaling: LogitScaling, bias: bool) -> None:
    check_backend("eager", eager, CPU, dtype, scaling=scaling, bias=bias)


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        (one_factor, "gradient of the weight"),
        (no_negative, "gradient of the hidden states"),
        (mean_of_all, "losses"),
        (crash, "RuntimeError: no kernel image is available"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_kernel_is_refused_by_name(kernel: Any, what: str, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=rf"loss_backend: broken .*{what}.*use loss_backend: torch"):
        check_backend("broken", kernel, CPU, dtype)


def test_a_kernel_that_ignores_scaling_or_bias_is_refused() -> None:
    def bare(hidden: Any, weight: Any, labels: Any, bias: Any = None, **_: Any) -> torch.Tensor:
        return eager(hidden, weight, labels)

    check_backend("bare", bare, CPU, torch.float32)
    with pytest.raises(ConfigError, match="bare errs in the losses"):
        check_backend("bare", bare, CPU, torch.float32, scaling=LogitScaling(softcap=2.0))
    with pytest.raises(ConfigError, match="bare failed its check"):
        check_backend("bare", bare, CPU, torch.float32, bias=True)


@pytest.mark.parametrize(("name", "package"), [("liger", "liger-kernel"), ("cut_cross_entropy", "cut-cross-entropy")])
def test_a_backend_needs_a_gpu_and_its_package(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=16, n_embd=8, n_layer=1, n_head=1, n_positions=8)
    )
    assert load_backend("torch", model, CPU, "fp32") is None
    with pytest.raises(ConfigError, match=f"loss_backend: {name} needs a GPU.*use loss_backend: torch"):
        load_backend(name, model, CPU, "fp32")
    monkeypatch.setattr("dualtok.model.loss_backends.find_spec", lambda _: None)  # a machine without the package
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        load_backend(name, model, torch.device("cuda"), "fp32")
