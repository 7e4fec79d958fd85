"""Cutting a Hugging Face causal language model into pipeline stages, so that no process ever holds all of it.

A stage is the model itself with only its own pieces: on the first stage the embeddings, on the last the final norm and
the head, everywhere a run of decoder layers. transformers' own forward pass of the base model then does the rest
(masks, rotary embeddings, document boundaries), which is the same code that an uncut model runs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dualtok.errors import ConfigError
from dualtok.model.empty import empty_causal_lm
from dualtok.model.folder.weights import WeightFiles
from dualtok.model.stage_bounds import cut

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

    from dualtok.config.model import ModelConfig
    from dualtok.model.stage_bounds import StageBounds


@dataclass(frozen=True)
class StageLayout:
    """The children of a base model in the order in which they run."""

    embeddings: tuple[str, ...]
    """What runs before the decoder layers, on the first stage."""
    layers: str
    """The list of decoder layers."""
    final: tuple[str, ...]
    """What runs after them, on the last stage."""


OWN_PLANS = {"gpt2": StageLayout(("wte", "wpe", "drop"), "h", ("ln_f",))}
"""Architectures that transformers gives no pipeline plan."""


def stage_layout_of(config: PretrainedConfig) -> StageLayout:
    """Return how an architecture is cut: transformers' ``base_model_pp_plan``, or our own table.

    Raises:
        ConfigError: neither knows the architecture.
    """
    text = config.get_text_config()
    if text.model_type in OWN_PLANS:
        return OWN_PLANS[text.model_type]
    names = list(getattr(text, "base_model_pp_plan", None) or ())
    if "layers" not in names:
        raise ConfigError(
            f"train.engine: transformers has no pipeline plan for {text.model_type!r}, so that it cannot be cut into "
            "stages; use train.engine=zero"
        )
    position = names.index("layers")
    return StageLayout(tuple(names[:position]), "layers", tuple(names[position + 1 :]))


def layer_costs(model: PreTrainedModel, layout: StageLayout) -> tuple[list[int], int]:
    """Return the cost of each decoder layer, and that of the head: parameters that are multiplied with each token.

    An embedding is looked up and costs nothing; a tied head is multiplied all the same.
    """
    layers = getattr(model.base_model, layout.layers)
    head = model.get_output_embeddings()
    return [sum(p.numel() for p in layer.parameters()) for layer in layers], head.weight.numel()


class _NoEmbedding(nn.Module):
    """Takes the place of an embedding on later stages: adds nothing where its result is added."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=ids.device)


def keep_stage(model: PreTrainedModel, layout: StageLayout, bounds: StageBounds) -> None:
    """Take away all pieces of a model that another stage holds; what is left runs as before."""
    base: Any = model.base_model
    layers = getattr(base, layout.layers)
    setattr(base, layout.layers, nn.ModuleList(layers[bounds.first : bounds.stop]))
    if not bounds.is_first:
        for name in layout.embeddings:
            child = getattr(base, name)
            setattr(base, name, _NoEmbedding() if isinstance(child, nn.Embedding) else nn.Identity())
    if not bounds.is_last:
        for name in layout.final:
            setattr(base, name, nn.Identity())
        model.set_output_embeddings(nn.Identity())
    base.config = _stage_config(base.config, len(layers), bounds)


def _stage_config(config: PretrainedConfig, layers: int, bounds: StageBounds) -> PretrainedConfig:
    """Return the base model's config for these layers: its forward looks settings up by the place of a layer."""
    own = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == layers:
            setattr(own, name, value[bounds.first : bounds.stop])
    own.num_hidden_layers = bounds.stop - bounds.first
    return own


@dataclass(frozen=True)
class StageNames:
    """How parameters of a stage are called in the uncut model: a stage counts its decoder layers from 0."""

    layers: str
    """Name of the list of decoder layers in the causal language model, e.g. ``model.layers``."""
    first_layers: tuple[int, ...]
    """The first layer of each stage."""

    def whole(self, name: str, stage: int) -> str:
        """Return the name in the uncut model of a stage's parameter."""
        prefix = f"{self.layers}."
        if not name.startswith(prefix):
            return name
        position, _, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{int(position) + self.first_layers[stage]}.{rest}"


def stage_names(model: PreTrainedModel, bounds: Sequence[StageBounds]) -> StageNames:
    """Return how the parameters of these stages are called in the uncut model."""
    layout = stage_layout_of(model.config)
    return StageNames(f"{model.base_model_prefix}.{layout.layers}", tuple(each.first for each in bounds))


def build_stage(
    folder: Path | str,
    config: PretrainedConfig,
    model: ModelConfig,
    balance: str | Sequence[int],
    *,
    stage: int,
    stages: int,
    dtype: torch.dtype,
    device: torch.device,
    settle: Callable[[list[nn.Parameter]], None] | None = None,
) -> tuple[PreTrainedModel, list[StageBounds]]:
    """Build one stage of a model and read its weights, one module at a time.

    Args:
        folder: Hugging Face folder or hub name with safetensors.
        config: its configuration.
        model: attention and activation checkpointing.
        balance: as for :func:`.stage_bounds.cut`.
        stage: the stage to build.
        stages: number of stages.
        dtype: dtype of the weights.
        device: where the weights are put.
        settle: called with the parameters of each module as soon as they are read, before the next ones are; ZeRO-3
            partitions them there.

    Returns:
        The stage, and the bounds of all stages.

    Raises:
        ConfigError: the architecture cannot be cut, there are too many stages, or a weight is missing.
    """
    causal_lm = empty_causal_lm(config, model.attention, origin=str(folder), real_buffers=True)
    layout = stage_layout_of(causal_lm.config)
    costs, head = layer_costs(causal_lm, layout)
    bounds = cut(costs, head, stages, balance)
    mine = bounds[stage]
    names = stage_names(causal_lm, bounds)
    files = WeightFiles(folder, causal_lm)
    keep_stage(causal_lm, layout, mine)
    if model.activation_checkpointing:
        causal_lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for name, module in causal_lm.named_modules():
        own = list(module.named_parameters(recurse=False))
        for leaf, parameter in own:
            whole = names.whole(f"{name}.{leaf}", stage)
            value = files.read(whole, tuple(parameter.shape))
            module.register_parameter(leaf, nn.Parameter(value.to(device, dtype), parameter.requires_grad))
        if own and settle is not None:
            settle([getattr(module, leaf) for leaf, _ in own])
    nn.Module.to(causal_lm, device)  # buffers
    return causal_lm, bounds
