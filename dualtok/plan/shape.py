"""A model's sizes, read from its configuration: the model is built on the meta device, where it takes no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Imported where they are used, for what they take to load: torch (1 s), transformers (1 to 4 s), and
# dualtok.model.empty, which imports both.


@dataclass(frozen=True)
class ModelShape:
    """Elements of each parameter, by where a pipeline would cut, and the widths that decide the activations."""

    first: tuple[int, ...]
    """Parameters before the decoder layers: the embeddings."""
    layers: tuple[tuple[int, ...], ...]
    """Parameters of each decoder layer."""
    last: tuple[int, ...]
    """Parameters after the decoder layers: the last norm and, if it is not tied, the head."""
    tied: int
    """Elements of the weight that embeddings and head share; 0 if they share none."""
    hidden: int
    feed_forward: int
    vocabulary: int
    gated: bool
    """Whether the feed-forward network has a gate (Llama and its kin), and the norms are RMSNorms."""
    queries: int = 0
    """Width of all attention heads together; 0 where it is ``hidden``."""
    adapters: tuple[tuple[int, ...], ...] = ()
    """Parameters of each decoder layer's adapters, which alone are trained; empty where the whole model is."""

    @property
    def parameters(self) -> int:
        """Elements of the whole model, a tied weight counted once."""
        return sum(self.first) + sum(map(sum, self.layers)) + sum(self.last)

    @property
    def trained(self) -> int:
        """Elements that have gradients: the adapters', or all."""
        return sum(map(sum, self.adapters)) if self.adapters else self.parameters

    @property
    def multiplied(self) -> int:
        """Elements that are multiplied with each token: the decoder layers and the head, but no embedding."""
        return sum(map(sum, self.layers)) + self.vocabulary * self.hidden

    @property
    def attended(self) -> int:
        """Multiply-adds per token and position attended to, of all layers' two products of attention."""
        return 2 * len(self.layers) * (self.queries or self.hidden)

    def stage_adapters(self, layers_per_stage: tuple[int, ...], stage: int) -> tuple[int, ...]:
        """Return the elements of each LoRA parameter that a pipeline stage holds."""
        begin = sum(layers_per_stage[:stage])
        return tuple(size for layer in self.adapters[begin : begin + layers_per_stage[stage]] for size in layer)

    def stage(self, layers_per_stage: tuple[int, ...], stage: int) -> tuple[int, ...]:
        """Return the elements of each parameter that a pipeline stage holds; both ends hold a tied weight."""
        begin = sum(layers_per_stage[:stage])
        held = [size for layer in self.layers[begin : begin + layers_per_stage[stage]] for size in layer]
        if stage == 0:
            held = [*self.first, *held]
        if stage == len(layers_per_stage) - 1:
            held += [*self.last, *([self.tied] if self.tied and stage > 0 else [])]
        return tuple(held)


def read_shape(
    config: PretrainedConfig, *, rank: int = 0, targets: tuple[str, ...] = (), scaled: tuple[str, ...] = ()
) -> ModelShape:
    """Return the sizes of the causal language model that a configuration describes.

    Args:
        config: the configuration.
        rank: of LoRA adapters; 0 for none.
        targets: names within their layer of the linear layers that get one.
        scaled: names within their layer of those whose outputs get a trained scale each.

    Raises:
        ValueError: it describes no model, or one without a list of decoder layers.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    from dualtok.model.empty import NO_MODEL, no_model, no_partitioning

    build: Any = AutoModelForCausalLM.from_config
    try:
        with no_partitioning(), torch.device("meta"):
            model: Any = build(config)
    except NO_MODEL as error:
        raise ValueError(str(no_model(error, config, None, config.name_or_path or "model.config"))) from None
    text = config.get_text_config()
    stacks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == text.num_hidden_layers and ".layers." not in name
    ]
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no list of {text.num_hidden_layers} decoder layers")
    prefix = stacks[0] + "."
    first: list[int] = []
    last: list[int] = []
    layers: list[list[int]] = [[] for _ in range(text.num_hidden_layers)]
    for name, parameter in model.named_parameters():
        if name.startswith(prefix):
            layers[int(name.removeprefix(prefix).split(".")[0])].append(parameter.numel())
        elif any(layers):
            last.append(parameter.numel())
        else:
            first.append(parameter.numel())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    heads = text.num_attention_heads
    width = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    return ModelShape(
        first=tuple(first),
        layers=tuple(map(tuple, layers)),
        last=tuple(last),
        tied=embedding.numel() if embedding is head else 0,
        hidden=text.hidden_size,
        feed_forward=int(width),
        vocabulary=text.vocab_size,
        gated=any("gate" in name for name, _ in model.named_parameters()),
        queries=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        adapters=_adapters(model.get_submodule(stacks[0]), rank, targets, scaled) if rank or scaled else (),
    )


def _adapters(layers: Any, rank: int, targets: tuple[str, ...], scaled: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the elements of A and B (Hu et al. 2021) of every targeted matrix and of all scales, layer by layer.

    The scales of the last normalization layer, which is in no decoder layer, are left out.
    """

    def elements(name: str, module: Any) -> tuple[int, ...]:
        last = name.rpartition(".")[2]
        if last in scaled:
            return (module.nf if hasattr(module, "nf") else module.weight.shape[0],)  # nf: of GPT-2's transposed layers
        return tuple(rank * width for width in module.weight.shape) if rank and last in targets else ()

    return tuple(
        tuple(size for name, module in layer.named_modules() for size in elements(name, module)) for layer in layers
    )
