"""Where a Hugging Face model lies, whether it is whole, and its weights read tensor by tensor."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from dualtok.errors import ConfigError
from dualtok.model.empty import tied_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch
    from transformers import PreTrainedModel

# Imported where they are used, for what they take to load: torch (1 s), transformers (1 to 4 s).

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
SHOWN = 3
"""Tensors that an error names; the others are counted."""
WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
SETTINGS_PATTERNS = (
    "*.json",
    "*.py",
    "*.model",
    "*.txt",
    "*.jinja",
    "README.md",
    "LICEN[SC]E*",
    "NOTICE*",
    "USE_POLICY*",
    "COPYING*",
)
"""What else is fetched of a model on the hub: its tokenizer, and what an export keeps."""


def model_folder(path: str | Path) -> Path:
    """Return the local folder of a model given as a folder or a hub name.

    Raises:
        ConfigError: it is neither.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder

    try:
        return Path(snapshot_download(str(path), allow_patterns=[*SETTINGS_PATTERNS, *WEIGHT_PATTERNS]))
    except Exception as error:  # the hub client raises a dozen unrelated classes for "cannot be had"
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{path}: neither a model folder nor a hub model that can be read: {reason}") from None


def weight_map(folder: Path, index: str = INDEX) -> dict[str, str]:
    """Return tensor name -> file of a model of several files; empty for a model without an index.

    Raises:
        ConfigError: the index is malformed, or names a file outside the folder.
    """
    path = folder / index
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


def stored_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return tensor name -> (file, shape) of what transformers would read of a model's folder; reads no weights.

    Raises:
        ConfigError: there are none, a file is missing or damaged, or a pickled one holds more than tensors.
    """
    for single, index in ((SINGLE, INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / single).is_file():
            return {name: (single, shape) for name, shape in _shapes(folder / single)}
        if files := weight_map(folder, index):
            every = sorted(set(files.values()))
            return {name: (file, shape) for file in every for name, shape in _shapes(folder / file)}
    raise ConfigError(f"{folder}: no weights ({SINGLE} or {INDEX}); write a model with `dualtok export`")


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the tensors in a file of weights."""
    import torch

    if not file.is_file():
        raise ConfigError(f"{file}: missing, though the model's index names it; get the model again")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as content:
                yield from ((name, tuple(content.get_slice(name).get_shape())) for name in content.keys())  # noqa: SIM118
        else:
            content = torch.load(file, map_location="meta", weights_only=True)
            yield from ((name, tuple(value.shape)) for name, value in content.items())
    except UnpicklingError:
        raise ConfigError(
            f"{file}: pickled weights that hold more than tensors, which may run code; they are not read. Get the "
            "model as safetensors"
        ) from None
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{file}: damaged, or no file of weights: {reason}; get the model again") from None


def first_difference(one: Path, other: Path) -> str | None:
    """Return the first tensor in which two models' folders differ, by name, shape or first row; None if in none.

    Raises:
        ConfigError: a folder has no safetensors, or a damaged one.
    """
    ours, theirs = stored_tensors(one), stored_tensors(other)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or ours[name][1] != theirs[name][1]:
            return name
        rows = [_first_row(folder / stored[name][0], name) for folder, stored in ((one, ours), (other, theirs))]
        if not rows[0].equal(rows[1]):
            return name
    return None


def _first_row(file: Path, name: str) -> torch.Tensor:
    if file.suffix != ".safetensors":
        raise ConfigError(f"{file}: pickled weights are not compared; save the model as safetensors")
    with safe_open(file, framework="pt") as content:
        part = content.get_slice(name)
        return part[:1] if part.get_shape() else content.get_tensor(name)


class WeightFiles:
    """The weights of a model, which were compared with its configuration; a tensor is read when it is asked for.

    Args:
        path: local folder or hub name.
        model: the whole model, with shapes alone; it tells under which names transformers stores its parameters.

    Raises:
        ConfigError: the folder does not hold exactly this model: a tensor is missing, of another shape, or of no use.
    """

    def __init__(self, path: Path | str, model: PreTrainedModel) -> None:
        self.folder = model_folder(path)
        self._stored = stored_tensors(self.folder)
        self._tied = tied_weights(model)
        self._names, self._converted = _stored_names(self._stored, model)
        self._require_whole(model)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a parameter.

        Args:
            name: its name in the causal language model.
            shape: the shape that the model's configuration gives it.

        Raises:
            ConfigError: it would have to be put together from others, or it lies in no safetensors.
        """
        known = next((self._names[other] for other in self._same_as(name) if other in self._names), None)
        if known is None and name in self._converted:
            raise ConfigError(
                f"{self.folder}: weight {name!r} is stored in pieces that transformers puts together while it loads a "
                "whole model, which a pipeline stage never does; use train.engine=zero for this architecture"
            )
        if known is None:
            raise ConfigError(
                f"{self.folder}: has no weight {name!r}; save the model again with transformers' save_pretrained"
            )
        value = self._tensor(known)
        assert tuple(value.shape) == shape, f"{known}: {tuple(value.shape)} is not {shape}"
        return value

    def _same_as(self, name: str) -> list[str]:
        """Return a parameter and those that are tied to it, the one that folders hold at first."""
        holder = self._tied.get(name, name)
        return [holder, *(other for other, its_holder in self._tied.items() if its_holder == holder)]

    def _tensor(self, stored: str) -> torch.Tensor:
        file = self.folder / self._stored[stored][0]
        if file.suffix != ".safetensors":
            raise ConfigError(
                f"{file}: a pipeline stage reads its own weights alone, which needs safetensors; save the model again "
                "with transformers' save_pretrained"
            )
        with safe_open(file, framework="pt") as content:
            value: torch.Tensor = content.get_tensor(stored)
        return value

    def _require_whole(self, model: PreTrainedModel) -> None:
        """Compare what is stored with what the model has, in names and shapes.

        transformers fills what is missing with random numbers, and says so in a log; under ZeRO-3 it does not even say
        what was of no use.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        stored = {name: self._stored[key][1] for name, key in self._names.items()}
        may_lack, may_add = _leave(model._keys_to_ignore_on_load_missing), _leave(_without_use(model))
        missing = [
            name
            for name in shapes
            if not may_lack(name)
            and not any(other in stored or other in self._converted for other in self._same_as(name))
        ]
        pieces = {whole: _pieces(model, whole) for whole in self._converted}
        missing += [
            f"{name} (of {whole})"
            for whole, parts in self._converted.items()
            for name in pieces[whole]
            if name not in parts
        ]
        of_no_use = [self._names[name] for name in stored if name not in shapes and not may_add(name)]
        of_no_use += [key for whole, parts in self._converted.items() if whole not in shapes for key in parts]
        misshapen = [
            f"{self._names[name]} is {shape}, not {shapes[name]}"
            for name, shape in stored.items()
            if name in shapes and shape != shapes[name]
        ]
        misshapen += [
            f"{key} is {self._stored[key][1]}, not {pieces[whole][key]}"
            for whole, parts in self._converted.items()
            for key in parts
            if key in pieces[whole] and self._stored[key][1] != pieces[whole][key]
        ]
        faults = [
            f"{len(found)} {what} ({', '.join(found[:SHOWN])}{', ...' if len(found) > SHOWN else ''})"
            for what, found in (("missing", missing), ("of another shape", misshapen), ("of no use", of_no_use))
            if found
        ]
        if faults:
            stored_small = hasattr(model.config, "quantization_config")
            quantized = ", or give weights that are not quantized" if stored_small else ""
            raise ConfigError(
                f"{self.folder}: its weights are not those of the model in its config.json ({len(shapes)} tensors): "
                f"{'; '.join(faults)}. Get the model again, or correct config.json{quantized}"
            )
        for name, holder in self._tied.items():
            if name in self._names and holder in self._names and self._names[name] != self._names[holder]:
                self._require_equal(name, holder)

    def _require_equal(self, name: str, holder: str) -> None:
        """Refuse two tensors that differ, though the configuration says that they are one."""
        import torch

        one, other = self._tensor(self._names[name]), self._tensor(self._names[holder])
        if not torch.equal(one, other):
            raise ConfigError(
                f"{self.folder}: config.json says tie_word_embeddings, but {self._names[name]} differs from "
                f"{self._names[holder]}; set tie_word_embeddings to false there, or remove the tensor that is not used"
            )


def _stored_names(stored: Iterable[str], model: PreTrainedModel) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return parameter -> its name in the folder, and parameter -> names of the stored tensors that it is made of.

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
    converted: dict[str, list[str]] = {}
    for key in stored:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, shapes)
        if converter is None:
            names[name] = key
        else:
            converted.setdefault(name, []).append(key)
    return names, converted


def _pieces(model: PreTrainedModel, name: str) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors that ``save_pretrained`` makes of a parameter, e.g. of all experts'."""
    from transformers.core_model_loading import revert_weight_conversion

    shapes = model.state_dict()
    parts = revert_weight_conversion(model, {name: shapes[name]}) if name in shapes else {}
    return {part: tuple(parts[part].shape) for part in sorted(parts)}


def _without_use(model: PreTrainedModel) -> list[str]:
    """Return patterns of tensors that some folders hold and no model of today reads: what its class names, and buffers
    that it computes."""
    buffers = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    computed = {r"rotary_emb\.inv_freq"} if any(name.endswith("rotary_emb.inv_freq") for name in buffers) else set()
    return [*(model._keys_to_ignore_on_load_unexpected or ()), *computed, *(f"^{re.escape(name)}$" for name in buffers)]


def _leave(patterns: Iterable[str] | None) -> Callable[[str], bool]:
    """Return whether a name matches one of transformers' patterns."""
    compiled = [re.compile(pattern) for pattern in patterns or ()]
    return lambda name: any(pattern.search(name) for pattern in compiled)
