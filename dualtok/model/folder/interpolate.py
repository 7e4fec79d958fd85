"""A model between two others of the same shape, tensor by tensor."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file

from dualtok.errors import ConfigError
from dualtok.files import atomic_folder, grant_as_umask_does
from dualtok.model.folder.weights import INDEX, SINGLE, weight_map

if TYPE_CHECKING:
    from pathlib import Path

    import torch


def write_interpolation(start: Path, end: Path, weight: float, target: Path) -> Path:
    """Write the model ``start + weight * (end - start)`` as a Hugging Face folder, whole or not at all.

    Configuration, tokenizer and the files' layout are those of ``end``. One file of weights is held at a time.

    Args:
        start: folder with the weights at 0.
        end: folder with the weights at 1.
        weight: how far to go.
        target: folder to make; what is there is replaced.

    Raises:
        ConfigError: a model has no safetensors, or they differ in names or shapes.
    """
    files = [weight_map(folder) or _single(folder) for folder in (start, end)]
    missing = set(files[0]) ^ set(files[1])
    if missing:
        raise ConfigError(
            f"{start} and {end}: {min(missing)!r} is a weight of one of them alone; both must have the same shape"
        )
    with atomic_folder(target) as folder:
        for other_file in end.iterdir():
            if other_file.is_file() and other_file.suffix not in (".safetensors", ".bin"):
                shutil.copyfile(other_file, folder / other_file.name)
        for file in dict.fromkeys(files[1].values()):
            save_file(_mix(start, end, files, file, weight), folder / file, metadata={"format": "pt"})
            grant_as_umask_does(folder / file)
    return target


def _mix(start: Path, end: Path, files: list[dict[str, str]], file: str, weight: float) -> dict[str, torch.Tensor]:
    """Return the tensors of one of ``end``'s files, mixed with those of the same names in ``start``."""
    mixed = {}
    with ExitStack() as stack:
        far = stack.enter_context(safe_open(end / file, framework="pt"))
        for name in far.keys():  # noqa: SIM118 - not a dictionary
            near = stack.enter_context(safe_open(start / files[0][name], framework="pt"))
            one, other = near.get_tensor(name), far.get_tensor(name)
            if one.shape != other.shape:
                raise ConfigError(f"{start} and {end}: {name!r} has shapes {tuple(one.shape)} and {tuple(other.shape)}")
            mixed[name] = one.float().lerp(other.float(), weight).to(other.dtype)
    return mixed


def _single(folder: Path) -> dict[str, str]:
    """Return tensor name -> file of a model of one safetensors file."""
    if not (folder / SINGLE).is_file():
        raise ConfigError(f"{folder}: no {SINGLE} or {INDEX}; save the model again with transformers' save_pretrained")
    with safe_open(folder / SINGLE, framework="pt") as content:
        return dict.fromkeys(content.keys(), SINGLE)
