"""Models that have shapes but no weights: what a configuration describes, at no cost of memory."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from dualtok.errors import ConfigError
from dualtok.model.own_code import has_own_class

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from transformers import PretrainedConfig, PreTrainedModel

# Imported where they are used, for what they take to load: transformers (1 to 4 s).
# Imported where they are used, for they need not be installed or wanted: accelerate.

NO_MODEL = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    RuntimeError,
    ZeroDivisionError,
    AssertionError,
)
"""What architectures raise on a configuration that describes no model, e.g. an activation that nobody knows."""


def empty_causal_lm(
    config: PretrainedConfig, attention: str | None = None, *, origin: str = "model.config", real_buffers: bool = False
) -> PreTrainedModel:
    """Return a model whose parameters have shapes but no memory.

    Args:
        config: of a causal language model.
        attention: attention implementation; None takes the architecture's own.
        origin: names the configuration in errors.
        real_buffers: whether what is computed (rotary frequencies) has its values; then weights can be put in.

    Raises:
        ConfigError: the configuration describes no model, or the architecture lacks the attention implementation.
    """
    from transformers import AutoModelForCausalLM

    try:
        with no_partitioning(), _without_weights(real_buffers=real_buffers):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, trust_remote_code=has_own_class(config)
            )
    except ImportError as error:
        raise ConfigError(f"model.attention: {_one_line(error)}") from None
    except NO_MODEL as error:
        raise no_model(error, config, attention, origin) from None
    model.config.use_cache = False
    return model


def _without_weights(*, real_buffers: bool) -> AbstractContextManager[object]:
    if not real_buffers:
        return torch.device("meta")
    from accelerate import init_empty_weights  # slow, for what it imports itself

    empty: AbstractContextManager[object] = init_empty_weights(include_buffers=False)
    return empty


def no_model(error: Exception, config: PretrainedConfig, attention: str | None, origin: str) -> ConfigError:
    """Return the error for a model that could not be built from its configuration."""
    if attention is not None and "does not support an attention implementation" in str(error):
        return ConfigError(
            f"model.attention: {config.get_text_config().model_type!r} does not support {attention!r}; use "
            "model.attention: eager"
        )
    reason = f"no {error} is known" if isinstance(error, KeyError) else _one_line(error)
    return ConfigError(f"{origin}: no model can be built: {reason}")


@contextmanager
def no_partitioning() -> Iterator[None]:
    """Let transformers build a model as it is, though a ZeRO-3 engine of this process (a reference) is alive.

    Its ``HfDeepSpeedConfig`` is global, and makes every model that is built or read partitioned.
    """
    from transformers.integrations import deepspeed

    alive = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = alive


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Return the parameters that are another one's: name -> the other's name."""
    if not model.config.get_text_config().tie_word_embeddings:
        return {}
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:240]
