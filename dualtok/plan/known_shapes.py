"""Names and shapes of every parameter of well-known architectures, from their settings alone.

They are those of the model that transformers would build (:func:`.shape.read_shape`), which takes seconds of imports.
h hidden, f feed-forward, q and k: all query heads and all key heads together, v vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dualtok.plan.shape import ModelShape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Parameters:
    """A causal language model's parameters, in the order in which transformers lists them."""

    first: Shapes
    """What comes before the decoder layers."""
    prefix: str
    """Name of the list of decoder layers."""
    layer: Shapes
    """Of one decoder layer, with names within it; the layers are alike."""
    layers: int
    last: Shapes
    """What comes after the decoder layers, without a head that is tied to the embedding."""
    linear: tuple[str, ...]
    """Linear layers within a decoder layer, in order, e.g. ``self_attn.q_proj``."""

    def named(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield every parameter's full name and shape."""
        yield from self.first.items()
        for layer in range(self.layers):
            yield from ((f"{self.prefix}.{layer}.{name}", shape) for name, shape in self.layer.items())
        yield from self.last.items()

    def targets(self) -> tuple[str, ...]:
        """Return the last parts of the linear layers' names, sorted; LoRA adapters are given to those."""
        return tuple(sorted({name.rpartition(".")[2] for name in self.linear}))


def parameters_of(settings: dict[str, Any]) -> Parameters:
    """Return the parameters of a model with these settings, which :func:`.known_settings.known_settings` made."""
    return FAMILIES[settings["model_type"]](settings)


def known_shape(settings: dict[str, Any], *, rank: int = 0, targets: tuple[str, ...] = ()) -> ModelShape:
    """Return what :func:`.shape.read_shape` returns for these settings, without building the model.

    Args:
        settings: complete, as :func:`.known_settings.known_settings` returns them.
        rank: of LoRA adapters; 0 for none.
        targets: names within their layer of the linear layers that get one.
    """
    own = parameters_of(settings)
    gpt2 = settings["model_type"] == "gpt2"
    hidden = settings["n_embd" if gpt2 else "hidden_size"]
    heads = settings["n_head" if gpt2 else "num_attention_heads"]
    adapted = [name for name in own.linear if name.rpartition(".")[2] in targets] if rank else []
    adapters = tuple(rank * width for name in adapted for width in own.layer[f"{name}.weight"])
    return ModelShape(
        first=_sizes(own.first),
        layers=(_sizes(own.layer),) * own.layers,
        last=_sizes(own.last),
        tied=settings["vocab_size"] * hidden if settings["tie_word_embeddings"] else 0,
        hidden=hidden,
        feed_forward=(settings["n_inner"] or 4 * hidden) if gpt2 else settings["intermediate_size"],
        vocabulary=settings["vocab_size"],
        gated=any("gate" in name for name in own.layer),
        queries=heads * (settings.get("head_dim") or hidden // heads),
        adapters=(adapters,) * own.layers if rank else (),
    )


def _sizes(shapes: Shapes) -> tuple[int, ...]:
    return tuple(map(math.prod, shapes.values()))


def _linear(name: str, outputs: int, inputs: int, *, bias: bool) -> Shapes:
    """Return a linear layer's weight [outputs, inputs] and bias."""
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def _norm(name: str, width: int, *, bias: bool) -> Shapes:
    return {f"{name}.weight": (width,), **({f"{name}.bias": (width,)} if bias else {})}


def _head(settings: dict[str, Any], hidden: int) -> Shapes:
    """Return the head's weight [v, h], nothing where it is the embedding's."""
    return {} if settings["tie_word_embeddings"] else {"lm_head.weight": (settings["vocab_size"], hidden)}


def _llama(settings: dict[str, Any]) -> Parameters:
    """Llama and its kin: RMSNorms, a gated feed-forward network, grouped heads."""
    kind, h, f = settings["model_type"], settings["hidden_size"], settings["intermediate_size"]
    heads = settings["num_attention_heads"]
    head_width = settings.get("head_dim") or h // heads
    q, k = heads * head_width, (settings["num_key_value_heads"] or heads) * head_width
    output_bias = settings.get("attention_bias", False)
    bias = output_bias or kind == "qwen2"
    mlp_bias = settings.get("mlp_bias", False)
    head_norms = {} if kind != "qwen3" else {f"self_attn.{name}_norm.weight": (head_width,) for name in "qk"}
    return Parameters(
        first={"model.embed_tokens.weight": (settings["vocab_size"], h)},
        prefix="model.layers",
        layer={
            **_linear("self_attn.q_proj", q, h, bias=bias),
            **_linear("self_attn.k_proj", k, h, bias=bias),
            **_linear("self_attn.v_proj", k, h, bias=bias),
            **_linear("self_attn.o_proj", h, q, bias=output_bias),
            **head_norms,
            **_linear("mlp.gate_proj", f, h, bias=mlp_bias),
            **_linear("mlp.up_proj", f, h, bias=mlp_bias),
            **_linear("mlp.down_proj", h, f, bias=mlp_bias),
            **_norm("input_layernorm", h, bias=False),
            **_norm("post_attention_layernorm", h, bias=False),
        },
        layers=settings["num_hidden_layers"],
        last={**_norm("model.norm", h, bias=False), **_head(settings, h)},
        linear=(
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        ),
    )


def _gpt2(settings: dict[str, Any]) -> Parameters:
    """GPT-2: learned positions; its linear layers keep their weights as [inputs, outputs]."""
    h = settings["n_embd"]
    f = settings["n_inner"] or 4 * h

    def transposed(name: str, inputs: int, outputs: int) -> Shapes:
        return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}

    return Parameters(
        first={
            "transformer.wte.weight": (settings["vocab_size"], h),
            "transformer.wpe.weight": (settings["n_positions"], h),
        },
        prefix="transformer.h",
        layer={
            **_norm("ln_1", h, bias=True),
            **transposed("attn.c_attn", h, 3 * h),
            **transposed("attn.c_proj", h, h),
            **_norm("ln_2", h, bias=True),
            **transposed("mlp.c_fc", h, f),
            **transposed("mlp.c_proj", f, h),
        },
        layers=settings["n_layer"],
        last={**_norm("transformer.ln_f", h, bias=True), **_head(settings, h)},
        linear=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    )


def _neox(settings: dict[str, Any]) -> Parameters:
    """GPT-NeoX (Pythia): LayerNorms, one matrix for queries, keys and values, biases everywhere."""
    h, f, bias = settings["hidden_size"], settings["intermediate_size"], settings["attention_bias"]
    return Parameters(
        first={"gpt_neox.embed_in.weight": (settings["vocab_size"], h)},
        prefix="gpt_neox.layers",
        layer={
            **_norm("input_layernorm", h, bias=True),
            **_norm("post_attention_layernorm", h, bias=True),
            **_linear("attention.query_key_value", 3 * h, h, bias=bias),
            **_linear("attention.dense", h, h, bias=bias),
            **_linear("mlp.dense_h_to_4h", f, h, bias=True),
            **_linear("mlp.dense_4h_to_h", h, f, bias=True),
        },
        layers=settings["num_hidden_layers"],
        last={**_norm("gpt_neox.final_layer_norm", h, bias=True), **_head(settings, h)},
        linear=("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    )


FAMILIES: dict[str, Callable[[dict[str, Any]], Parameters]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _llama),
    "gpt2": _gpt2,
    "gpt_neox": _neox,
}
"""Architecture -> its parameters."""
