"""A Hugging Face causal language model whose own forward can give token losses, without the logits of all tokens.

The Trainer wraps a model (peft, DistributedDataParallel, DeepSpeed, FSDP) and each wrapper expects that the forward of
the model is called, and that what is trained on comes out of it. So neither is another module put around the model,
which would change the names in its checkpoints, nor is its head called from outside: the model gets another forward.

Legend: b batch, t position.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import ModelOutput

from dualtok.errors import ConfigError
from dualtok.integrations.transformers.settings import DualConfig
from dualtok.model.load import logit_scaling
from dualtok.model.loss_backends import load_backend
from dualtok.model.losses import check_batch, check_errors, give_loss_head
from dualtok.objective.head import IGNORED_LABEL, LossHead, token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN_FORWARD, MEMORY = "_forward_without_token_losses", "_loss_memory_mib"
NO_FEATURES = (
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",
)
"""What a forward may be called with that its base model must not see."""


@dataclass
class TokenLossOutput(ModelOutput):
    """What a model returns where it is called with ``shift_labels`` and without ``labels``."""

    token_losses: torch.Tensor | None = None
    """CE of each token [b, t], nats, float32, aligned with ``shift_labels`` and 0 where they are -100."""
    shift_labels: torch.Tensor | None = None
    """The token that each position predicts [b, t], int64, or -100."""
    reference_loss: torch.Tensor | None = None
    """As it was given [b, t], aligned with ``input_ids``; left out if it was not."""


def with_token_losses(model: Any, config: DualConfig | None = None) -> Any:
    """Let a causal language model, or one with peft adapters, return token losses; changes it in place, and returns it.

    Called with ``shift_labels`` and without ``labels`` it then returns a :class:`TokenLossOutput`. All other calls give
    what they gave before. Its forward also takes ``reference_loss``, so that the Trainer keeps that column. A plain
    linear output layer becomes a :class:`~dualtok.objective.head.LossHead` with the same parameters and names, so that
    ``save_pretrained`` writes the same files.

    Args:
        model: a ``PreTrainedModel`` with a causal language model's head, or a ``PeftModel`` around one. Doing it again
            changes only the settings of the head.
        config: memory and backend of the loss head.

    Raises:
        ConfigError: the model is of another kind, or the backend cannot be used.
    """
    causal_lm = causal_lm_of(model)
    config = config or DualConfig()
    kernel = load_backend(config.loss_backend, causal_lm, causal_lm.device, _precision(causal_lm))
    give_loss_head(causal_lm, config.loss_memory_mib, kernel)
    setattr(causal_lm, MEMORY, config.loss_memory_mib)
    if PLAIN_FORWARD not in vars(causal_lm):
        plain = causal_lm.forward
        setattr(causal_lm, PLAIN_FORWARD, plain)
        causal_lm.forward = MethodType(_forward_like(plain), causal_lm)
    return model


def causal_lm_of(model: Any) -> PreTrainedModel:
    """Return the Hugging Face model itself, within peft's wrapping if there is one.

    Raises:
        ConfigError: it is no causal language model with a base model and a head, puts virtual tokens before the
            prompt, or adds a loss of its routers.
    """
    name = type(model).__name__
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ConfigError(f"{name}: prompt tuning adds tokens that have no reference loss; use LoRA or another adapter")
    causal_lm = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    head = getattr(causal_lm, "get_output_embeddings", lambda: None)()
    if head is None or getattr(causal_lm, "base_model", causal_lm) is causal_lm or causal_lm.config.is_encoder_decoder:
        raise ConfigError(f"{name}: no causal language model of transformers; load it with AutoModelForCausalLM")
    if getattr(causal_lm.config, "output_router_logits", False):
        raise ConfigError(
            f"{name}: output_router_logits adds a loss of the routers, which the dual loss has not; set it to False"
        )
    found: PreTrainedModel = causal_lm
    return found


def aligned_with_predictions(values: torch.Tensor, filling: float) -> torch.Tensor:
    """Shift values [b, t] from the token that they belong to, to the position that predicts it; the last is filled."""
    shifted = torch.full_like(values, filling)
    shifted[..., :-1] = values[..., 1:]
    return shifted


def token_losses_of(causal_lm: PreTrainedModel, inputs: dict[str, Any], labels_bt: torch.Tensor) -> torch.Tensor:
    """Return CE of every token [b, t] in float32, given the inputs of the model's forward.

    Args:
        causal_lm: with or without a loss head.
        inputs: ``input_ids`` and what else the base model takes; others are left out.
        labels_bt: shifted labels.
    """
    features = {name: value for name, value in inputs.items() if value is not None and name not in NO_FEATURES}
    hidden = _hidden_states(causal_lm, features)
    head = causal_lm.get_output_embeddings()
    if not isinstance(head, LossHead) and torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return token_losses(
        hidden,
        labels_bt,
        head,
        vocabulary=causal_lm.config.get_text_config().vocab_size,
        scaling=logit_scaling(causal_lm.config),
        memory_mib=getattr(causal_lm, MEMORY, None),
    )


def _hidden_states(causal_lm: PreTrainedModel, features: dict[str, Any]) -> torch.Tensor:
    shape = features["input_ids"].shape if "input_ids" in features else features["inputs_embeds"].shape[:2]
    packed = features.get("position_ids") is not None and features.get("attention_mask") is None
    if packed and causal_lm.config._attn_implementation == "flash_attention_2":
        # transformers finds the documents of a packed batch for flash attention only when it has one row.
        features = {**features, **{name: features[name].flatten(0, 1)[None] for name in ("input_ids", "position_ids")}}
    # With a cache transformers ignores the starts in position_ids: attention crosses documents without a sign.
    hidden = causal_lm.base_model(**features, use_cache=False).last_hidden_state
    return hidden.view(*shape, -1)


def head_errors(causal_lm: PreTrainedModel, input_ids: torch.Tensor, *, packed: bool) -> torch.Tensor:
    """Return what :func:`dualtok.model.losses.require_faithful` judges: errors of the head and of boundaries, [2].

    Args:
        causal_lm: in evaluation mode, its weights gathered.
        input_ids: [b, t]; the beginning of the first row is taken.
        packed: whether rows hold several documents. If not, the error of boundaries is 0.
    """
    probe = check_batch({"input_ids": input_ids})
    if not packed:
        ids = probe["input_ids"][:1]
        probe = {"input_ids": ids, "labels": aligned_with_predictions(ids, IGNORED_LABEL)}
    labels = probe.pop("labels")
    own = token_losses_of(causal_lm, probe, labels)
    logits = getattr(causal_lm, PLAIN_FORWARD)(**probe, use_cache=False).logits
    if not packed:  # both rows alike
        own, logits, labels = own.repeat(2, 1), logits.repeat(2, 1, 1), labels.repeat(2, 1)
    return check_errors(own, logits, labels)


def _forward_like(plain: Any) -> Any:
    """Return a forward for a model whose own is ``plain``, with its signature and two columns more."""

    def forward(
        self: Any,
        *args: Any,
        reference_loss: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        check_packed: bool | None = None,
        **inputs: Any,
    ) -> Any:
        if check_packed is not None:
            return TokenLossOutput(token_losses=head_errors(self, inputs["input_ids"], packed=check_packed))
        if shift_labels is None or inputs.get("labels") is not None:
            if shift_labels is not None:
                inputs["shift_labels"] = shift_labels
            return getattr(self, PLAIN_FORWARD)(*args, **inputs)
        if reference_loss is not None and reference_loss.dtype != torch.float32:
            raise ConfigError(
                f"reference_loss: has become {reference_loss.dtype} on its way to the model, as DeepSpeed and FSDP do "
                "in bf16; near ties would fall otherwise. Use DualTrainer, which keeps it in float32"
            )
        bound = dict(zip(names, args, strict=False))
        return TokenLossOutput(token_losses_of(self, {**bound, **inputs}, shift_labels), shift_labels, reference_loss)

    own = inspect.signature(plain)
    names = list(own.parameters)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("reference_loss", "shift_labels")
        if name not in own.parameters
    ]
    kept = list(own.parameters.values())
    rest = [parameter for parameter in kept if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    myself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    before = [parameter for parameter in kept if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    forward.__signature__ = own.replace(parameters=[myself, *before, *added, *rest])  # type: ignore[attr-defined]
    forward.__doc__ = plain.__doc__
    return forward


def _precision(causal_lm: PreTrainedModel) -> str:
    return "bf16" if causal_lm.dtype == torch.bfloat16 else "fp32"
