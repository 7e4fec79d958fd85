"""Where a Hugging Face model lies, and its weights read tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dualtok.errors import ConfigError

if TYPE_CHECKING:
    import torch

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
        return Path(snapshot_download(str(path), allow_patterns=["*.json", *WEIGHT_PATTERNS, "*.model"]))
    except Exception as error:  # the hub client raises a dozen unrelated classes for "cannot be had"
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{path}: neither a model folder nor a hub model that can be read: {reason}") from None


class WeightFiles:
    """The safetensors of a model; a tensor is read when it is asked for, from a memory-mapped file.

    Args:
        path: local folder or hub name.

    Raises:
        ConfigError: there are no safetensors.
    """

    def __init__(self, path: Path | str) -> None:
        self.folder = model_folder(path)
        if (self.folder / INDEX).is_file():
            files: dict[str, str] = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        elif (self.folder / SINGLE).is_file():
            from safetensors import safe_open

            with safe_open(self.folder / SINGLE, framework="pt") as content:
                files = dict.fromkeys(content.keys(), SINGLE)
        else:
            raise ConfigError(
                f"{path}: no {SINGLE} or {INDEX}; a pipeline stage reads its own weights alone, which needs "
                "safetensors: save the model again with transformers' save_pretrained"
            )
        self._files = files

    def read(self, name: str, shape: tuple[int, ...], base_prefix: str) -> torch.Tensor:
        """Return a parameter.

        Args:
            name: its name in the causal language model.
            shape: the shape that the model's configuration gives it.
            base_prefix: prefix of the base model's parameters, which folders of bare base models leave out.

        Raises:
            ConfigError: it is missing or has another shape.
        """
        from safetensors import safe_open

        known = next((key for key in (name, name.removeprefix(f"{base_prefix}.")) if key in self._files), None)
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
