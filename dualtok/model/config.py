"""Settings of the model in training."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass


@dataclass(config=ConfigDict(extra="forbid"))
class ModelConfig:
    """A Hugging Face model to start from: pretrained weights (``path``) or a fresh one (``config``)."""

    path: str | None = None
    """Folder or hub name of a Hugging Face causal language model whose weights are the starting point."""

    config: dict[str, Any] | None = None
    """Hugging Face configuration of a model made from scratch, e.g. ``{model_type: llama, hidden_size: 256, ...}``.
    ``vocab_size`` may be left out: it is the tokenizer's. Weights are drawn once from ``seed``, whatever the ranks."""

    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation; each of them stops at the document boundaries of packed blocks."""

    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass instead of keeping them: less memory, about a third more
    computation."""

    def __post_init__(self) -> None:
        """Require exactly one origin of the weights."""
        if (self.path is None) == (self.config is None):
            raise ValueError("model: give exactly one of 'path' (pretrained) and 'config' (from scratch)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("model.config: needs 'model_type', e.g. llama")
