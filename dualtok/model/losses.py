"""A causal language model seen as what dualtok needs of it: one loss, or a few signals, per token.

Legend: b batch, t position, n = b * t tokens, d hidden, v vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dualtok.errors import ConfigError
from dualtok.model.load import logit_scaling
from dualtok.objective.chunked_cross_entropy import linear_cross_entropy
from dualtok.objective.head import IGNORED_LABEL, LossHead, token_losses

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from dualtok.objective.chunked_cross_entropy import LinearCrossEntropy

Batch = dict[str, torch.Tensor]
CHECK_TOKENS = 64


class TokenLossModel(nn.Module):
    """Wraps a Hugging Face causal language model; its forward gives CE(theta; t) for every token of packed blocks.

    A plain linear output layer is replaced, in the model itself, by a :class:`~dualtok.objective.head.LossHead` with
    the same parameters. The loss is computed inside ``forward``, so that under ZeRO-3 the output layer is gathered by
    its own hooks.

    Args:
        causal_lm: a model with ``base_model`` and output embeddings that takes ``position_ids``.
        memory_mib: memory for logits in MiB; None takes
            :func:`~dualtok.objective.chunked_cross_entropy.default_memory_mib`.
        kernel: computes the losses; None takes dualtok's own.

    Raises:
        ConfigError: a kernel is given and the output layer is no plain linear one.
    """

    def __init__(
        self, causal_lm: PreTrainedModel, *, memory_mib: float | None = None, kernel: LinearCrossEntropy | None = None
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._memory_mib = memory_mib
        self._scaling = logit_scaling(causal_lm.config)
        give_loss_head(causal_lm, memory_mib, kernel)
        # transformers finds the documents of a packed batch for flash attention only when it has one row.
        self._one_row = causal_lm.config._attn_implementation == "flash_attention_2"

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Return the last hidden states [b, t, d]; positions that do not grow by one start a new document."""
        inputs = self.base_inputs(batch)
        if self._one_row:
            inputs = {name: tensor.flatten(0, 1)[None] for name, tensor in inputs.items()}
        # With a cache transformers ignores the starts in position_ids: attention crosses documents without a sign.
        output = self.causal_lm.base_model(**inputs, use_cache=False)
        return output.last_hidden_state.view(*batch["position_ids"].shape, -1)

    def base_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return what the base model takes."""
        return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., v] of hidden states [..., d] as the model itself would compute them."""
        return self._scaling(self.causal_lm.get_output_embeddings()(hidden))

    def forward(self, batch: Batch, check: bool = False) -> Any:
        """Return :meth:`compute` of the batch, or with ``check`` the :func:`check_errors` of a :func:`check_batch`.

        Both run inside ``forward``, where ZeRO-3 has the weights.
        """
        return self.errors(batch) if check else self.compute(batch)

    def errors(self, probe: Batch) -> torch.Tensor:
        """Return the :func:`check_errors` of a :func:`check_batch`."""
        own = TokenLossModel.compute(self, probe)
        logits = self.causal_lm(**self.base_inputs(probe), use_cache=False).logits
        return check_errors(own, logits, probe["labels"])

    def compute(self, batch: Batch) -> Any:
        """Return the token losses [b, t] in float32, aligned with ``labels`` and 0 where a label is -100."""
        hidden = self.hidden_states(batch)
        return token_losses(
            hidden,
            batch["labels"],
            self.causal_lm.get_output_embeddings(),
            scaling=self._scaling,
            memory_mib=self._memory_mib,
            vocabulary=self.causal_lm.config.get_text_config().vocab_size,
        )


class SignalModel(TokenLossModel):
    """Like :class:`TokenLossModel`, but returns the audit's signals; one block at a time, to bound memory."""

    def __init__(
        self, causal_lm: PreTrainedModel, signals: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]
    ) -> None:
        super().__init__(causal_lm)
        self._signals = signals

    def compute(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the signals of every token, each [b, t]."""
        hidden = self.hidden_states(batch)
        rows = [
            self._signals(self.logits(hidden[row : row + 1]), batch["labels"][row : row + 1])
            for row in range(len(hidden))
        ]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def give_loss_head(
    causal_lm: PreTrainedModel, memory_mib: float | None = None, kernel: LinearCrossEntropy | None = None
) -> None:
    """Put a loss head where the model has its output layer, unless that is no plain linear one.

    Args:
        causal_lm: is changed in place.
        memory_mib: as for :class:`TokenLossModel`.
        kernel: likewise.

    Raises:
        ConfigError: as :class:`TokenLossModel`.
    """
    layer = causal_lm.get_output_embeddings()
    if not LossHead.can_replace(layer):
        if kernel is None:
            return
        raise ConfigError(
            f"train.loss_backend: {type(causal_lm).__name__}'s output layer is a {type(layer).__name__}, no plain "
            "linear one; use loss_backend: torch"
        )
    name = next(name for name, module in causal_lm.named_modules() if module is layer)
    parent, _, attribute = name.rpartition(".")
    kernel = kernel or partial(linear_cross_entropy, memory_mib=memory_mib)
    head = LossHead(layer, scaling=logit_scaling(causal_lm.config), kernel=kernel)
    setattr(causal_lm.get_submodule(parent), attribute, head)


def check_batch(batch: Batch) -> Batch:
    """Return two short rows that tell whether a model is what dualtok takes it for; :func:`check_errors` judges them.

    Both hold two documents, made of the first tokens of the batch's first block. The second ones are equal, the first
    ones are not: a model that looks across document boundaries gives the second ones different losses.
    """
    ids = batch["input_ids"][:1, :CHECK_TOKENS].repeat(2, 1)
    length = ids.shape[1]
    half = length // 2
    ids[1, :half] = ids[1, :half].flip(0) // 2  # another first document, of ids that the model knows
    positions = torch.arange(length, device=ids.device)
    positions = torch.where(positions < half, positions, positions - half).repeat(2, 1)
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[:, :-1] = ids[:, 1:]
    labels[:, half - 1] = IGNORED_LABEL
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def check_errors(own: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return what :func:`require_faithful` judges: the errors of head and boundaries, relative to the mean loss, [2].

    * Some architectures scale or cap their logits after ``lm_head``. One that does so in a way unknown to
      :func:`dualtok.model.load.logit_scaling` would train on wrong losses without a sign.
    * Some take ``position_ids`` and yet look across document boundaries (another mask, or a recurrent state).

    Args:
        own: dualtok's token losses of a :func:`check_batch` [2, t].
        logits: the model's own logits [2, t, v].
        labels: the probe's labels [2, t].
    """
    theirs = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    ).view_as(own)
    half = own.shape[1] // 2
    between_rows = (own[0, half:] - own[1, half:]).abs().max()
    return torch.stack([(own - theirs).abs().max(), between_rows]) / theirs.mean().clamp(min=1e-6)


def require_faithful(errors: torch.Tensor, precision: str, architecture: str) -> None:
    """Raise ConfigError when :func:`check_errors` are beyond what rounding explains."""
    tolerance = 1e-4 if precision == "fp32" else 5e-2
    head, boundary = errors.tolist()
    if not head <= tolerance:
        raise ConfigError(
            f"{architecture}: its logits differ from lm_head(hidden states) by {head:.2g} (relative, allowed "
            f"{tolerance}); this architecture changes its logits in a way that dualtok does not know"
        )
    if not boundary <= tolerance:
        raise ConfigError(
            f"{architecture}: a document's losses change by {boundary:.2g} (relative, allowed {tolerance}) with the "
            "document packed before it; choose an architecture or model.attention that stops at document boundaries"
        )
