"""Settings of the model in training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(config=ConfigDict(extra="forbid"))
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): W x + alpha / rank * B A x with W frozen; only A and B are trained."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rows of A and columns of B; the trained parameters grow with it. Unit: none."""

    alpha: Annotated[int, Field(ge=1)] = 32
    """Scale of the adapter's output; alpha / rank multiplies it. Unit: none."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the adapter's input while training. Unit: probability."""

    targets: tuple[str, ...] | None = None
    """Names of the linear layers that get an adapter, e.g. ``[q_proj, v_proj]``; without it every linear layer of the
    decoder, never the ``lm_head``."""


@dataclass(config=ConfigDict(extra="forbid"))
class Ia3Config:
    """Learned scales (IA3, Liu et al. 2022): every output of a linear layer is multiplied by a number that is trained,
    and the weights stay as they are. So few numbers can learn what a text is like, but hardly a single document."""

    norms: bool = True
    """Whether the normalization layers (their scales and, where they have any, offsets) are trained as well."""

    targets: tuple[str, ...] | None = None
    """Names of the linear layers whose outputs get a scale, e.g. ``[v_proj, down_proj]``; without it every linear layer
    of the decoder, never the ``lm_head``."""


@dataclass(config=ConfigDict(extra="forbid"))
class ModelConfig:
    """A Hugging Face model to start from: pretrained weights (``path``) or a fresh one (``config``)."""

    path: str | None = None
    """Folder or hub name of a Hugging Face causal language model whose weights are the starting point."""

    config: dict[str, Any] | None = None
    """Hugging Face configuration of a model made from scratch, e.g. ``{model_type: llama, hidden_size: 256, ...}``.
    ``vocab_size`` may be left out: it is the tokenizer's. Weights are drawn once from ``seed``, whatever the ranks."""

    trust_remote_code: bool = False
    """Run Python code that the folder or hub repository ``path`` brings, with all your rights; only for
    ``train.engine: zero``. Read the code first."""

    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation; each of them stops at the document boundaries of packed blocks. The names are those of
    transformers; ``flash_attention_2`` needs its package and a GPU."""

    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass instead of keeping them: less memory, about a third more
    computation."""

    lora: LoraConfig | None = None
    """Train low-rank adapters and leave the starting weights as they are; without ``lora`` and ``ia3`` all weights are
    trained."""

    ia3: Ia3Config | None = None
    """Train scales alone. They learn less than ``lora``, and give much less away for what they learn. They take a
    learning rate of about .01 to .03."""

    quantize: Literal["nf4"] | None = None
    """Keep the frozen starting weights in 4 bits (QLoRA, Dettmers et al. 2023), through bitsandbytes; only with
    ``lora`` and ZeRO stage 0 to 2."""

    @property
    def adapter(self) -> LoraConfig | Ia3Config | None:
        """What is trained in place of the weights; None where these are trained."""
        return self.lora if self.lora is not None else self.ia3

    def __post_init__(self) -> None:
        """Require exactly one origin of the weights."""
        if (self.path is None) == (self.config is None):
            raise ValueError("model: give exactly one of 'path' (pretrained) and 'config' (from scratch)")
        if self.trust_remote_code and self.path is None:
            raise ValueError("model.trust_remote_code: has no effect without model.path; remove it")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("model.config: needs 'model_type', e.g. llama")
        if self.lora is not None and self.ia3 is not None:
            raise ValueError("model: give 'lora' or 'ia3', not both")
        if self.quantize is not None and self.lora is None:
            raise ValueError("model.quantize: weights in 4 bits cannot be trained; it needs the section model.lora")
