"""Where a Hugging Face model lies, and its weights read tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dualtok.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from transformers import PreTrainedModel

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


def model_folder(path: str | Path) -> Path:
    """Return the local folder of a model given as a folder or a hub name.

    Raises:
        ConfigError: it is neither.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.py", *WEIGHT_PATTERNS, "*.model"]))
    except Exception as error:  # the hub client raises a dozen unrelated classes for "cannot be had"
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{path}: neither a model folder nor a hub model that can be read: {reason}") from None


def weight_map(folder: Path) -> dict[str, str]:
    """Return tensor name -> file of a model of several safetensors; empty for a model without an index.

    Raises:
        ConfigError: the index is malformed, or names a file outside the folder.
    """
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        files: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        outside = next((file for file in files.values() if Path(file).is_absolute() or ".." in Path(file).parts), None)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: malformed; save the model again with transformers' save_pretrained") from None
    if outside is not None:
        raise ConfigError(f"{path}: names {outside!r}, which is outside the model's folder; do not trust this model")
    return files


class WeightFiles:
    """The safetensors of a model; a tensor is read when it is asked for, from a memory-mapped file.

    Args:
        path: local folder or hub name.
        model: the whole model, with shapes alone; it tells under which names transformers stores its parameters.

    Raises:
        ConfigError: there are no safetensors.
    """

    def __init__(self, path: Path | str, model: PreTrainedModel) -> None:
        self.folder = model_folder(path)
        files = weight_map(self.folder)
        if not files and (self.folder / SINGLE).is_file():
            from safetensors import safe_open

            with safe_open(self.folder / SINGLE, framework="pt") as content:
                files = dict.fromkeys(content.keys(), SINGLE)
        if not files:
            raise ConfigError(
                f"{path}: no {SINGLE} or {INDEX}; a pipeline stage reads its own weights alone, which needs "
                "safetensors: save the model again with transformers' save_pretrained"
            )
        self._files = files
        self._stored_names, self._converted = _stored_names(files, model)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a parameter.

        Args:
            name: its name in the causal language model.
            shape: the shape that the model's configuration gives it.

        Raises:
            ConfigError: it is missing, has another shape, or would have to be put together from others.
        """
        from safetensors import safe_open

        known = self._stored_names.get(name)
        if known is None and name in self._converted:
            raise ConfigError(
                f"{self.folder}: weight {name!r} is stored in pieces that transformers puts together while it loads a "
                "whole model, which a pipeline stage never does; use train.engine=zero for this architecture"
            )
        if known is None:
            raise ConfigError(
                f"{self.folder}: has no weight {name!r}; save the model again with transformers' save_pretrained"
            )
        with safe_open(self.folder / self._files[known], framework="pt") as content:
            value: torch.Tensor = content.get_tensor(known)
        if tuple(value.shape) != shape:
            raise ConfigError(
                f"{self.folder / self._files[known]}: weight {known!r} has shape {tuple(value.shape)}, but config.json "
                f"says {shape}"
            )
        return value


def _stored_names(stored: Iterable[str], model: PreTrainedModel) -> tuple[dict[str, str], set[str]]:
    """Return parameter name -> name in the folder, and the parameters that are made of several stored tensors.

    transformers renames parameters between its classes and its folders (GPT-NeoX's ``lm_head`` is stored as
    ``embed_out``), and folders of bare base models lack the base model's prefix.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    shapes = model.state_dict()
    names: dict[str, str] = {}
    converted: set[str] = set()
    for key in stored:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, shapes)
        if converter is None:
            names[name] = key
        else:
            converted.add(name)
    return names, converted
