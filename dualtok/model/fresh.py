"""Random weights for a model from scratch, drawn and written piece by piece: never is the whole model in memory.

The architecture's own ``_init_weights`` decides what is drawn. It is first rehearsed on the meta device, where it costs
nothing, to learn which module touches which tensors: in GPT-2 the attention module draws its child's ``c_proj`` again.
Tensors that are touched together form a group, which is materialised, drawn, written and dropped.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn

from dualtok.errors import ConfigError
from dualtok.files import grant_as_umask_does, write_text
from dualtok.model.empty import NO_MODEL, no_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

# Imported where they are used, for what they take to load: transformers (1 to 4 s).

SHARD_BYTES = 512 * 2**20
"""Largest file of weights (a single larger tensor gets its own); this much is held in memory while they are drawn."""


@dataclass
class _Group:
    """Tensors that must exist together while they are drawn."""

    names: list[str]
    """Saved tensors, in the order of the state dict."""

    modules: list[tuple[PreTrainedModel, nn.Module]]
    """(model whose ``_init_weights`` is called, its argument), in the order of the calls."""


def write_fresh_weights(
    config: PretrainedConfig,
    seed: int,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Draw a model's weights from ``seed`` and save them as a Hugging Face folder.

    Written once, they give every ZeRO stage and any number of ranks the same starting point. Each tensor is drawn in
    float32 and depends on (seed, its name, its shape) alone, so that another ``dtype`` changes nothing but the rounding
    and another ``shard_bytes`` nothing at all. The peak of memory is about ``shard_bytes`` and the largest tensor.
    Tensors keep the names that transformers has in memory (``save_original_format=False``); ``from_pretrained`` reads
    them.

    Args:
        config: of a causal language model.
        seed: of the draws; the global random state is left alone.
        folder: where ``config.json`` and ``model*.safetensors`` are written.
        dtype: of the parameters in the files.
        shard_bytes: largest file of weights.

    Raises:
        ConfigError: the configuration describes no model, e.g. one of width 0, or the architecture draws no value for
            one of its weights.
    """
    model = meta_model(config)
    saved = _saved_tensors(model, dtype)
    plan = split_torch_state_dict_into_shards(
        saved, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    waiting: dict[str, dict[str, torch.Tensor]] = {file: {} for file in plan.filename_to_tensors}
    for group in _groups(model, saved):
        for name, tensor in _draw(model, group, seed):
            waiting[plan.tensor_to_filename[name]][name] = tensor.to(saved[name].dtype)
        for file in {plan.tensor_to_filename[name] for name in group.names}:
            if len(waiting[file]) == len(plan.filename_to_tensors[file]):
                save_file(waiting.pop(file), folder / file, metadata={"format": "pt"})
                grant_as_umask_does(folder / file)
    assert not waiting, f"files never completed: {sorted(waiting)}"
    if plan.is_sharded:
        parameters = sum(tensor.numel() for tensor in saved.values())
        metadata = {"total_parameters": parameters, **plan.metadata}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the causal language model of a configuration with float32 parameters that have shapes but no memory.

    Raises:
        ConfigError: no model can be built.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except NO_MODEL as error:
        raise no_model(error, config, None, "model.config") from None
    return model


def _saved_tensors(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what ``save_pretrained`` would save, on the meta device: no tied weight twice, parameters in ``dtype``."""
    parameters = dict(model.named_parameters())
    skipped = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    return {
        name: tensor.detach().to(dtype) if name in parameters and tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
        if name not in skipped
    }


def _calls(model: PreTrainedModel, module: nn.Module | None = None) -> Iterator[tuple[PreTrainedModel, nn.Module]]:
    """Yield the calls of ``_init_weights`` in transformers' order: children first, each by its nearest model."""
    from transformers import PreTrainedModel

    module = model if module is None else module
    for child in module.children():
        yield from _calls(child if isinstance(child, PreTrainedModel) else model, child)
    yield model, module


@torch.no_grad()
def _groups(model: PreTrainedModel, saved: dict[str, torch.Tensor]) -> list[_Group]:
    """Rehearse the initialisation and return the groups, ordered by their first tensor.

    Raises:
        ConfigError: some tensor is touched by no call.
    """
    name_of = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items() if name in saved}
    group_of: dict[str, _Group] = {}
    with torch.random.fork_rng(devices=[]):
        for owner, module in _calls(model):
            below = [t for t in (*module.parameters(), *module.buffers()) if id(t) in name_of]
            before = [tensor._version for tensor in below]
            owner._init_weights(module)
            touched = [name_of[id(t)] for t, version in zip(below, before, strict=True) if t._version != version]
            joined = {id(group_of[name]): group_of[name] for name in touched if name in group_of}
            group = _Group([], [])
            for other in joined.values():
                group.names += other.names
                group.modules += other.modules
            group.names += [name for name in touched if name not in group_of]
            group.modules.append((owner, module))
            group_of |= dict.fromkeys(group.names, group)
    untouched = [name for name in saved if name not in group_of]
    if untouched:
        raise ConfigError(
            f"model.config: {type(model).__name__} draws no value for {untouched[0]}; start from pretrained weights "
            "(model.path)"
        )
    return list({id(group_of[name]): group_of[name] for name in saved}.values())


def _draw(model: PreTrainedModel, group: _Group, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and values of a group, whose tensors are materialised for this long only.

    The other end of a tied weight stays on the meta device, where drawing it again has no effect.
    """
    homes = [_home(model, name) for name in group.names]
    for home, leaf in homes:
        real = torch.empty_like(home[leaf], device="cpu")
        home[leaf] = nn.Parameter(real, home[leaf].requires_grad) if isinstance(home[leaf], nn.Parameter) else real
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(_seed_of(seed, group.names[0]))
        for owner, module in group.modules:
            owner._init_weights(module)
    for name, (home, leaf) in zip(group.names, homes, strict=True):
        drawn = home[leaf].detach()
        home[leaf] = None
        yield name, drawn


def _home(model: PreTrainedModel, name: str) -> tuple[dict[str, Any], str]:
    """Return the dictionary that holds a parameter or buffer, and its key there."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if leaf in module._parameters else module._buffers), leaf


def _seed_of(seed: int, name: str) -> int:
    """Return a 63-bit seed that differs between names."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
