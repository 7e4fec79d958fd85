from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtok.objective import LogitScaling
from dualtok.objective.chunked_cross_entropy import (
    ACCELERATOR_LOSS_MEMORY_MIB,
    LOSS_MEMORY_MIB,
    WORKING_SHARE,
    chunk_rows,
    default_memory_mib,
    linear_cross_entropy,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

N, D, V = 15, 5, 7
PLENTY = 256.0
SCALINGS = {
    "plain": LogitScaling(),
    "factor": LogitScaling(0.37),
    "softcap": LogitScaling(softcap=1.5),
    "both": LogitScaling(2.5, 2.0),
}


def budget(rows: int, itemsize: int = 4, vocabulary: int = V) -> float:
    """Return the memory in MiB with which ``rows`` rows are at work at once, and three times as many are kept."""
    memory = WORKING_SHARE * rows * vocabulary * itemsize / 2**20
    assert chunk_rows(memory, vocabulary, itemsize) == rows
    return memory


def problem(seed: int = 0, dtype: torch.dtype = torch.float64, n: int = N, **sizes: int) -> dict[str, torch.Tensor]:
    """Return hidden states, weight and bias that take gradients, labels and per-token factors, some 0, some below."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = sizes.get("vocabulary", V)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((n, D), (vocabulary, D), (vocabulary,))
    )
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < 0.2] = -100
    factors = torch.randn(n, generator=generator)
    factors[torch.rand(n, generator=generator) < 0.3] = 0.0
    return {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels, "factors": factors}


def formula(p: dict[str, torch.Tensor], scaling: LogitScaling, *, bias: bool) -> torch.Tensor:
    """Return the losses by torch's own operations, in the precision of the hidden states."""
    logits = p["hidden"] @ p["weight"].T + (p["bias"] if bias else 0.0)
    logits = logits * scaling.factor
    if scaling.softcap is not None:
        logits = scaling.softcap * torch.tanh(logits / scaling.softcap)
    return torch.nn.functional.cross_entropy(logits, p["labels"], reduction="none")


def kernel(p: dict[str, torch.Tensor], scaling: LogitScaling, *, bias: bool, memory: float) -> torch.Tensor:
    return linear_cross_entropy(
        p["hidden"], p["weight"], p["labels"], p["bias"] if bias else None, scaling=scaling, memory_mib=memory
    )


def leaves(p: dict[str, torch.Tensor], *, bias: bool) -> list[torch.Tensor]:
    return [p[name] for name in ("hidden", "weight", "bias")[: 3 if bias else 2]]


# One row at work: three are kept and the others computed again; three: nine are kept; plenty: all.
@pytest.mark.parametrize("memory", [budget(1, 8), budget(3, 8), PLENTY])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_gradients_are_the_derivatives(scaling: str, bias: bool, memory: float) -> None:
    p = problem()
    assert (p["labels"] == -100).any()

    def weighted(*tensors: torch.Tensor) -> torch.Tensor:
        names = dict(zip(("hidden", "weight", "bias"), tensors, strict=False))
        return kernel({**p, **names}, SCALINGS[scaling], bias=bias, memory=memory) * p["factors"].double()

    assert torch.autograd.gradcheck(weighted, leaves(p, bias=bias))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(0, 40),
    st.sampled_from(sorted(SCALINGS)),
    st.booleans(),
    st.sampled_from([1, 2, 5, 11, 1000]),
)
def test_values_and_gradients_are_those_of_the_formula(seed: int, n: int, scaling: str, bias: bool, rows: int) -> None:
    p = problem(seed, n=n)
    found = kernel(p, SCALINGS[scaling], bias=bias, memory=budget(rows, 8))
    expected = formula(p, SCALINGS[scaling], bias=bias)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad((losses * p["factors"]).sum(), leaves(p, bias=bias)) for losses in (found, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the sizes of matrix products, of exponentials, and of logits (anything 4096 wide but the weight turned)."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, ...]] = []
        self.exponentials = 0
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            self.products.append(tuple(args[0].shape if name == "mm" else args[1].shape))
        if name in ("exp_", "exp"):
            self.exponentials += args[0].numel()
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim == 2 and result.shape[1] == 4096 and len(result) != D:
            self.largest = max(self.largest, result.shape[0])
        return result


@pytest.fixture
def large() -> Iterator[dict[str, torch.Tensor]]:
    p = problem(3, dtype=torch.float32, n=64, vocabulary=4096)
    p["labels"][:] = p["labels"].clamp(min=0)
    p["labels"][:8] = -100
    p["factors"][:] = 0.0
    p["factors"][[2, 19, 40, 63]] = torch.tensor([1.0, -1.0, 0.5, -2.0])  # the first of them has no label
    return p


@pytest.mark.parametrize(("rows", "again"), [(1000, 0), (4, 2)])
def test_the_backward_pass_visits_selected_tokens_only(large: dict[str, torch.Tensor], rows: int, again: int) -> None:
    """56 tokens have labels, three of them weigh something; with 4 rows at work the first 12 are kept."""
    with Watch() as watch:
        losses = kernel(large, LogitScaling(), bias=False, memory=budget(rows, vocabulary=4096))
    assert sum(shape[0] for shape in watch.products) == 56
    with Watch() as watch:
        torch.autograd.grad((losses * large["factors"]).sum(), leaves(large, bias=False))
    assert watch.exponentials == 3 * 4096
    recomputed = [shape for shape in watch.products if shape[1] == D]
    assert sum(shape[0] for shape in recomputed) == again, "token 19 is the twelfth with a label, and kept"
    into_hidden = [shape for shape in watch.products if shape[1] == 4096]
    assert sum(shape[0] for shape in into_hidden) == 3


def test_no_more_logits_than_the_budget_allows_exist_at_once(large: dict[str, torch.Tensor]) -> None:
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 2 and tensor.shape[1] == 4096:
            saved.append(tensor.shape[0])
        return tensor

    large["factors"][:] = 1.0
    with Watch() as watch, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = kernel(large, LogitScaling(), bias=False, memory=budget(4, vocabulary=4096))
    assert saved == [12]
    assert watch.largest == 12
    with Watch() as watch:
        losses.sum().backward()
    assert watch.largest <= 4


def test_nothing_is_kept_without_gradients(large: dict[str, torch.Tensor]) -> None:
    with torch.no_grad(), Watch() as watch:
        losses = kernel(large, LogitScaling(), bias=False, memory=budget(4, vocabulary=4096))
    assert watch.largest == 4
    assert not losses.requires_grad
    torch.testing.assert_close(losses, kernel(large, LogitScaling(), bias=False, memory=PLENTY).detach())


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("memory", [budget(2), PLENTY])
def test_what_needs_no_gradient_gets_none(frozen: str, memory: float) -> None:
    p = problem(4, torch.float32)
    p[frozen].requires_grad_(requires_grad=False)
    losses = kernel(p, LogitScaling(), bias=True, memory=memory)
    with Watch() as watch:
        losses.backward(p["factors"])
    assert p[frozen].grad is None
    expected = {name: leaf for name, leaf in p.items() if leaf.requires_grad}
    reference = torch.autograd.grad(formula(p, LogitScaling(), bias=True), list(expected.values()), p["factors"])
    for name, gradient in zip(expected, reference, strict=True):
        torch.testing.assert_close(p[name].grad, gradient, rtol=1e-4, atol=1e-5)
    wide = [shape for shape in watch.products if V in shape]
    if frozen == "hidden":
        assert not any(shape[1] == V for shape in wide), "the product for the hidden states was computed for nothing"
    if frozen == "weight":
        assert not any(shape[0] == V for shape in wide), "the product for the weight was computed for nothing"


def test_a_second_backward_pass_gives_the_same() -> None:
    p = problem(5)
    losses = (kernel(p, LogitScaling(), bias=True, memory=budget(3, 8)) * p["factors"]).sum()
    first = torch.autograd.grad(losses, leaves(p, bias=True), retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(losses, leaves(p, bias=True)), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_a_derivative_of_the_gradient_is_refused() -> None:
    p = problem(6)
    (gradient,) = torch.autograd.grad(
        kernel(p, LogitScaling(), bias=False, memory=PLENTY).square().sum(), p["hidden"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("fill", ["no label", "no weight"])
@pytest.mark.parametrize("memory", [budget(2), PLENTY])
def test_a_rank_without_tokens_still_has_gradients_of_zero(fill: str, memory: float) -> None:
    p = problem(7, torch.float32)
    labels = torch.full_like(p["labels"], -100) if fill == "no label" else p["labels"]
    losses = linear_cross_entropy(p["hidden"], p["weight"], labels, p["bias"], memory_mib=memory)
    (losses * 0.0).sum().backward()
    for leaf in leaves(p, bias=True):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_a_broken_token_that_weighs_nothing_breaks_no_gradient() -> None:
    p = problem(8, torch.float32)
    p["labels"][:2] = 3
    p["factors"][0] = 0.0
    with torch.no_grad():
        p["hidden"][0] = float("nan")
    losses = kernel(p, LogitScaling(), bias=False, memory=PLENTY)
    assert torch.isnan(losses[0])
    for gradient in torch.autograd.grad(losses, leaves(p, bias=False), p["factors"]):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize("scaling", ["plain", "both"])
def test_bfloat16_is_reduced_in_float32(rows: int, scaling: str) -> None:
    """Values and gradients are those of the float32 formula on the same logits, to the rounding of single numbers."""
    p = problem(9, torch.bfloat16, n=300, vocabulary=2000)
    found = kernel(p, SCALINGS[scaling], bias=False, memory=budget(rows, 2, 2000))
    assert found.dtype == torch.float32
    exact = {**p, **{name: p[name].detach().double().requires_grad_() for name in ("hidden", "weight")}}
    expected = formula(exact, SCALINGS[scaling], bias=False)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=2e-2)
    ours = torch.autograd.grad(found, leaves(p, bias=False), p["factors"])
    theirs = torch.autograd.grad(expected, leaves(exact, bias=False), p["factors"].double())
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - other).norm() / other.norm() < 1e-2


def test_many_small_gradients_of_a_low_precision_weight_do_not_drown() -> None:
    """4096 chunks of one token each: summed in bfloat16, the weight's gradient would stop growing at 256 of them."""
    n = 4096
    hidden = torch.ones(n, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    losses = linear_cross_entropy(hidden, weight, torch.zeros(n, dtype=torch.int64), memory_mib=1e-9)
    losses.sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [-n / 2, n / 2]


def test_shapes_that_disagree_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(15, 5\).*\(14,\)"):
        linear_cross_entropy(problem()["hidden"], problem()["weight"], problem()["labels"][1:])


def test_chunks_follow_the_budget() -> None:
    assert chunk_rows(256, 2**16, 4) == 256
    assert chunk_rows(256, 2**16, 2) == 512
    assert chunk_rows(1e-9, 2**16, 4) == 1


def test_an_accelerator_gets_larger_chunks_than_a_cpu() -> None:
    """Small chunks leave it waiting; a CPU works within its caches."""
    assert default_memory_mib(torch.device("cpu")) == LOSS_MEMORY_MIB
    assert default_memory_mib(torch.device("cuda", 1)) == ACCELERATOR_LOSS_MEMORY_MIB > LOSS_MEMORY_MIB
