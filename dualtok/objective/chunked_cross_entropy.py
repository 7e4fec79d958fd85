"""The cross-entropy of a linear layer's logits as one autograd function; its backward pass visits selected tokens only.

Legend: n tokens, r tokens with a label, s selected tokens (an incoming gradient that is not 0), c rows of a chunk,
d hidden, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from dualtok.objective.settings import ACCELERATOR_LOSS_MEMORY_MIB, LOSS_MEMORY_MIB

IGNORED_LABEL = -100

WORKING_SHARE = 4
"""One part in so many of the memory budget holds the chunk at work, the others the logits that are kept."""
CPU_BLOCK, ACCELERATOR_BLOCK = 2**18, 2**24
"""Most logits whose exponentials are taken at once: a part of a CPU's cache; enough work for an accelerator."""


@dataclass(frozen=True)
class LogitScaling:
    """What some architectures do to their logits after the output layer: softcap * tanh(factor * z / softcap)."""

    factor: float = 1.0
    """Multiplies the logits (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``)."""

    softcap: float | None = None
    """Bound of the logits (Gemma's ``final_logit_softcapping``); None leaves them unbounded."""

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the scaled logits, any shape, with a gradient where the argument has one."""
        scaled = logits if self.factor == 1.0 else logits * self.factor
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap

    def apply_(self, logits: torch.Tensor) -> None:
        """Scale logits in place; they must take no gradient."""
        if self.factor != 1.0:
            logits.mul_(self.factor)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, scaled: torch.Tensor) -> torch.Tensor | None:
        """Return the derivative of the soft cap at *scaled* logits, without the factor; None where it is 1."""
        return None if self.softcap is None else 1.0 - (scaled / self.softcap).square()


AS_THEY_ARE = LogitScaling()


class LinearCrossEntropy(Protocol):
    """A kernel. Its backward pass must honour a different, also negative, incoming gradient for each token."""

    def __call__(
        self,
        hidden_nd: torch.Tensor,
        weight_vd: torch.Tensor,
        labels_n: torch.Tensor,
        bias_v: torch.Tensor | None = None,
        *,
        scaling: LogitScaling = AS_THEY_ARE,
    ) -> torch.Tensor:
        """Return losses [n], 0 where a label is -100."""


def linear_cross_entropy(
    hidden_nd: torch.Tensor,
    weight_vd: torch.Tensor,
    labels_n: torch.Tensor,
    bias_v: torch.Tensor | None = None,
    *,
    scaling: LogitScaling = AS_THEY_ARE,
    memory_mib: float | None = None,
) -> torch.Tensor:
    """Return CE(theta; t) of every token from its last hidden state.

    Tokens without a label cost nothing. Logits are kept for the backward pass, in the type they were computed in, as
    far as ``memory_mib`` reaches; the others leave only their log-sum-exp behind and are computed again if they are
    selected. The backward pass visits tokens whose incoming gradient is not 0, and no others. Reductions over the
    vocabulary run in float32 (float64 for float64); so does the sum over chunks of a low-precision weight's gradient.

    Nothing here is a collective: ranks may differ in their labels, selections and numbers of chunks.

    Args:
        hidden_nd: last hidden states, any float dtype.
        weight_vd: the output layer's weight, same dtype.
        labels_n: int64, already shifted: the token that a position predicts, or -100.
        bias_v: the output layer's bias.
        scaling: what the architecture does to its logits.
        memory_mib: budget for logits in MiB, kept ones and those at work together. One row always fits. None takes
            :func:`default_memory_mib`.

    Returns:
        [n] float32 (float64 for float64), 0 where the label is -100. Differentiable once.

    Raises:
        ValueError: hidden states and labels disagree in n.
    """
    if hidden_nd.shape[:-1] != labels_n.shape:
        raise ValueError(
            f"hidden states have shape {tuple(hidden_nd.shape)}, labels {tuple(labels_n.shape)}; "
            "all but the last dimension of the hidden states must agree"
        )
    inputs = (hidden_nd, weight_vd, bias_v)
    # Asked here: inside an autograd function gradients are always off.
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    how = _How(scaling, default_memory_mib(hidden_nd.device) if memory_mib is None else memory_mib, keep)
    losses: torch.Tensor = _LinearCrossEntropy.apply(*inputs, labels_n, how)  # type: ignore[no-untyped-call]
    return losses


def default_memory_mib(device: torch.device) -> int:
    """Return the memory for logits in MiB where no setting names it."""
    return LOSS_MEMORY_MIB if device.type == "cpu" else ACCELERATOR_LOSS_MEMORY_MIB


def chunk_rows(memory_mib: float, vocabulary: int, itemsize: int) -> int:
    """Return how many tokens' logits are at work at once under a budget; at least 1.

    Args:
        memory_mib: the budget in MiB.
        vocabulary: logits of one token.
        itemsize: bytes of a logit.
    """
    return max(1, int(memory_mib * 2**20 / WORKING_SHARE / (vocabulary * itemsize)))


class _How(NamedTuple):
    scaling: LogitScaling
    memory_mib: float
    keep: bool
    """Whether there will be a backward pass."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        hidden_nd: torch.Tensor,
        weight_vd: torch.Tensor,
        bias_v: torch.Tensor | None,
        labels_n: torch.Tensor,
        how: _How,
    ) -> torch.Tensor:
        rows_r = (labels_n != IGNORED_LABEL).nonzero().squeeze(1)
        hidden_rd, labels_r = _take(hidden_nd, rows_r), labels_n[rows_r]
        vocabulary, r = len(weight_vd), len(rows_r)
        size = chunk_rows(how.memory_mib, vocabulary, hidden_nd.element_size())
        n_kept = min(r, (WORKING_SHARE - 1) * size) if how.keep else 0
        kept_kv = hidden_nd.new_empty(n_kept, vocabulary)
        work_cv = hidden_nd.new_empty(min(size, r - n_kept), vocabulary)
        log_sum_r, target_r = (torch.empty(r, dtype=_sum_dtype(hidden_nd), device=hidden_nd.device) for _ in range(2))
        for here in _cut(0, n_kept, size) + _cut(n_kept, r, size):
            logits_cv = kept_kv[here] if here.stop <= n_kept else work_cv[: here.stop - here.start]
            _logits(hidden_rd[here], weight_vd, bias_v, how.scaling, out=logits_cv)
            _log_sum_exp(logits_cv, out=log_sum_r[here])
            target_r[here] = logits_cv.gather(1, labels_r[here, None]).squeeze(1)
        losses_n = log_sum_r.new_zeros(len(labels_n))
        losses_n[rows_r] = log_sum_r - target_r
        if how.keep:
            ctx.save_for_backward(hidden_nd, weight_vd, bias_v, labels_n, rows_r, log_sum_r, kept_kv)
            ctx.scaling, ctx.size = how.scaling, size
        return losses_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_n: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_nd, weight_vd, bias_v, labels_n, rows_r, log_sum_r, kept_kv = ctx.saved_tensors
        scaling: LogitScaling = ctx.scaling
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        gradient_r = gradient_n[rows_r]
        selected_s = gradient_r.nonzero().squeeze(1)  # indices into r, ascending: kept ones come first
        n_kept = int((selected_s < len(kept_kv)).sum())
        chunks = _cut(0, n_kept, ctx.size) + _cut(n_kept, len(selected_s), ctx.size)
        work_cv = hidden_nd.new_empty(max((c.stop - c.start for c in chunks), default=0), len(weight_vd))
        into_hidden = torch.zeros_like(hidden_nd) if wants_hidden else None
        into_weight = _Sum(weight_vd, len(chunks)) if wants_weight else None
        into_bias = _Sum(bias_v, len(chunks)) if wants_bias else None
        for here in chunks:
            chosen_c = selected_s[here]
            tokens_c = rows_r[chosen_c]
            hidden_cd, slopes_cv = hidden_nd[tokens_c], work_cv[: len(chosen_c)]
            if here.stop <= n_kept:
                logits_kv, source_c = kept_kv, chosen_c
            else:
                _logits(hidden_cd, weight_vd, bias_v, scaling, out=slopes_cv)
                logits_kv, source_c = slopes_cv, None
            _slopes(
                logits_kv,
                source_c,
                labels_n[tokens_c],
                log_sum_c=log_sum_r[chosen_c],
                weight_c=gradient_r[chosen_c] * scaling.factor,
                scaling=scaling,
                out=slopes_cv,
            )
            if into_hidden is not None:
                into_hidden[tokens_c] = slopes_cv @ weight_vd
            if into_weight is not None:
                into_weight.add_product(slopes_cv.t(), hidden_cd)
            if into_bias is not None:
                into_bias.add(slopes_cv.sum(0, dtype=_sum_dtype(slopes_cv)))
        sums = [None if total is None else total.result() for total in (into_weight, into_bias)]
        return into_hidden, *sums, None, None


class _Sum:
    """A parameter's gradient, summed over chunks; in float32 where more than one sum in a lower precision would err."""

    def __init__(self, parameter: torch.Tensor, chunks: int) -> None:
        self._dtype = parameter.dtype
        self._like = parameter
        self._sum: torch.Tensor | None = None
        self._sum_dtype = _sum_dtype(parameter) if chunks > 1 else parameter.dtype

    def add_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        if self._sum is not None and self._sum_dtype == left.dtype:
            self._sum.addmm_(left, right)  # without a buffer for the product
        else:
            self.add(left @ right)

    def add(self, part: torch.Tensor) -> None:
        if self._sum is None:
            self._sum = part.to(self._sum_dtype)
        else:
            self._sum += part

    def result(self) -> torch.Tensor:
        return torch.zeros_like(self._like) if self._sum is None else self._sum.to(self._dtype)


def _logits(
    hidden_cd: torch.Tensor,
    weight_vd: torch.Tensor,
    bias_v: torch.Tensor | None,
    scaling: LogitScaling,
    *,
    out: torch.Tensor,
) -> None:
    if bias_v is None:
        torch.mm(hidden_cd, weight_vd.t(), out=out)
    else:
        torch.addmm(bias_v, hidden_cd, weight_vd.t(), out=out)
    scaling.apply_(out)


def _log_sum_exp(logits_cv: torch.Tensor, *, out: torch.Tensor) -> None:
    for here in _blocks(logits_cv):
        out[here] = torch.logsumexp(logits_cv[here].to(out.dtype), 1)


def _slopes(
    logits_kv: torch.Tensor,
    source_c: torch.Tensor | None,
    labels_c: torch.Tensor,
    *,
    log_sum_c: torch.Tensor,
    weight_c: torch.Tensor,
    scaling: LogitScaling,
    out: torch.Tensor,
) -> None:
    """Write the loss's derivative with respect to the raw logits, (softmax - one-hot) * weight, to ``out`` [c, v].

    ``source_c`` are the rows of ``logits_kv`` to read; None means that they stand in ``out`` already.
    """
    for here in _blocks(out):
        block = out[here] if source_c is None else logits_kv[source_c[here]]
        block = block.to(log_sum_c.dtype)
        slope = scaling.slope(block)
        block.sub_(log_sum_c[here, None]).exp_()
        block.scatter_add_(1, labels_c[here, None], block.new_full((len(block), 1), -1.0))
        block.mul_(weight_c[here, None])
        if slope is not None:
            block.mul_(slope)
        if block.data_ptr() != out[here].data_ptr():
            out[here] = block


def _take(hidden_nd: torch.Tensor, rows_r: torch.Tensor) -> torch.Tensor:
    return hidden_nd if len(rows_r) == len(hidden_nd) else hidden_nd[rows_r]


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _cut(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _blocks(logits_cv: torch.Tensor) -> list[slice]:
    """Cut rows so small that what is read, exponentiated and written stays in the cache."""
    most = CPU_BLOCK if logits_cv.device.type == "cpu" else ACCELERATOR_BLOCK
    return _cut(0, len(logits_cv), max(1, most // logits_cv.shape[1]))
