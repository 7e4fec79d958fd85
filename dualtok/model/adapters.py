"""Adapters through peft, low-rank ones and scales: put into any module tree, drawn the same in every layout, switched.

No wrapper is used: the adapters are injected into the linear layers where they stand, so that a whole model and the
modules of a pipeline stage are treated alike. ``name_of`` tells how a tree's module is called in the whole model; the
layers of a stage are counted from its first one.
"""

from __future__ import annotations

import copy
import shutil
import warnings
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dualtok.config.model import LoraConfig
from dualtok.errors import ConfigError, did_you_mean
from dualtok.files import grant_as_umask_does
from dualtok.model.empty import empty_causal_lm
from dualtok.model.folder.weights import first_difference, model_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager

    import peft
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PretrainedConfig, PreTrainedModel

    from dualtok.config.model import Ia3Config

    Settings = peft.LoraConfig | peft.IA3Config
    """Of one adapter, as peft has them."""

# Imported where they are used, for what they take to load: peft (3 s), transformers (1 to 4 s).

TRAINED = "trained"
"""peft's name of the adapter in training; part of its parameters' names."""
REFERENCE = "reference"
"""peft's name of the adapter that makes the base the reference model."""
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
"""What peft puts before the base model's own names in an adapter's file."""


Names = Callable[[str], str]
"""A module's name in a tree -> its name in the whole model."""


def adapter_settings(kind: LoraConfig | Ia3Config, config: PretrainedConfig, base: str | None = None) -> Settings:
    """Return peft's settings of a run's adapters; reads no weights.

    Args:
        kind: the run's section ``model.lora`` or ``model.ia3``.
        config: configuration of the base model.
        base: folder or hub name of the base, which an exported adapter names.

    Raises:
        ConfigError: ``targets`` names a layer that the model does not have or that can have no adapter.
    """
    import peft

    known = linear_layers(config)
    section = "lora" if isinstance(kind, LoraConfig) else "ia3"
    for target in kind.targets or ():
        if target not in known:
            raise ConfigError(
                f"model.{section}.targets: {target!r} is no linear layer of this model's decoder"
                f"{did_you_mean(target, known)}; it has {', '.join(known)}"
            )
    empty = empty_causal_lm(config)
    common: dict[str, Any] = {
        "target_modules": list(kind.targets or known),
        "fan_in_fan_out": any(_is_transposed(module) for module in empty.modules()),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
    }
    if isinstance(kind, LoraConfig):
        return peft.LoraConfig(r=kind.rank, lora_alpha=kind.alpha, lora_dropout=kind.dropout, **common)
    norms = sorted({name.rpartition(".")[2] for name, _ in norm_layers(empty)}) if kind.norms else None
    return peft.IA3Config(feedforward_modules=[], modules_to_save=norms, **common)


def norm_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the normalization layers below a module that have scales, with their names."""
    for name, layer in module.named_modules():
        if type(layer).__name__.endswith("Norm") and isinstance(getattr(layer, "weight", None), nn.Parameter):
            yield name, layer


def linear_layers(config: PretrainedConfig) -> list[str]:
    """Return the names that the linear layers of a model's decoder have within their layer, e.g. ``q_proj``."""
    return sorted({name.rpartition(".")[2] for name in _linear_names(empty_causal_lm(config))})


def _linear_names(model: PreTrainedModel) -> set[str]:
    """Return the names of a model's linear layers, without the head."""
    head = model.get_output_embeddings()
    return {name for name, module in model.named_modules() if _is_linear(module) and module is not head}


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


@dataclass(frozen=True)
class Adapters:
    """What a run puts into its base model; every part of it was compared with the base's configuration."""

    trained: Settings
    """The adapter in training."""
    seed: int
    """The run's seed."""
    reference: peft.LoraConfig | None = None
    """The frozen adapter that makes the base the reference; None where the reference is the bare base or another
    model."""
    reference_folder: Path | None = None
    """Where its weights are."""

    def put_into(self, module: nn.Module, name_of: Names = str) -> None:
        """Put the adapters into a model or a part of one, before DeepSpeed has taken hold of it.

        Raises:
            ConfigError: the reference's weights do not fit.
        """
        add_adapter(module, self.trained, self.seed, name_of=name_of)
        if self.reference is not None and self.reference_folder is not None:
            add_adapter(module, self.reference, self.seed, name=REFERENCE, name_of=name_of)
            load_adapter(module, self.reference_folder, name_of=name_of)

    def as_reference(self, module: nn.Module) -> AbstractContextManager[None]:
        """Let a module tree compute as the reference for a while."""
        return as_reference(module, None if self.reference is None else REFERENCE)


def prepare_adapters(
    kind: LoraConfig | Ia3Config, config: PretrainedConfig, *, seed: int, base: str, reference: str | None = None
) -> Adapters:
    """Check a run's adapters against its base model and return them; reads no weights.

    Args:
        kind: the section ``model.lora`` or ``model.ia3``.
        config: configuration of the base model.
        seed: the run's seed.
        base: folder or hub name of the base.
        reference: ``reference.adapter``.

    Raises:
        ConfigError: a target or the reference's adapter does not fit the base.
    """
    folder = None if reference is None else Path(reference)
    theirs = None if folder is None else read_adapter_settings(folder, config)
    return Adapters(adapter_settings(kind, config, base), seed, theirs, folder)


def add_adapter(module: nn.Module, settings: Settings, seed: int, *, name: str = TRAINED, name_of: Names = str) -> None:
    """Put adapters into a module tree, in place, and freeze everything else in it.

    A is drawn as peft does (uniform, Kaiming) from (seed, the layer's name in the whole model), so that it depends on
    neither ranks nor stages; B is 0, so that the model starts as its base. Scales start at 1. Normalization layers
    are trained where they are; peft has a copy of them for each adapter (``modules_to_save``).

    Args:
        module: a model, or part of one; before DeepSpeed has taken hold of it.
        settings: made by :func:`adapter_settings` or :func:`read_adapter_settings`.
        seed: the run's seed.
        name: :data:`TRAINED`, or :data:`REFERENCE` for one that stays as it is.
        name_of: a module's name in this tree -> its name in the whole model.
    """
    import peft

    with warnings.catch_warnings():  # a second adapter in one model is what is wanted
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        injected = copy.copy(settings)
        injected.modules_to_save = None
        peft.inject_adapter_in_model(injected, module, adapter_name=name)
    for path, layer in lora_layers(module):
        if name not in layer.lora_A:
            continue
        generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name_of(path).encode()))
        weight = _weight(layer, "lora_A", name)
        drawn = torch.empty(weight.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
        with torch.no_grad():
            weight.copy_(drawn)
    module.requires_grad_(False)
    activate(module, TRAINED)
    for path, norm in norm_layers(module):
        if path.rpartition(".")[2] in (settings.modules_to_save or ()):
            norm.requires_grad_(True)


def adapted_layers(module: nn.Module) -> Iterator[BaseTunerLayer]:
    """Yield the layers with adapters of any kind below a module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            yield layer


def lora_layers(module: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the layers with low-rank adapters below a module, with their names."""
    from peft.tuners.lora import LoraLayer

    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer


def activate(module: nn.Module, name: str | None) -> None:
    """Let a module tree compute with one of its adapters, or without any (None).

    The trained adapter is trainable while it is the active one; a reference never is.
    """
    for layer in adapted_layers(module):
        if name is None:
            layer.enable_adapters(False)
        elif any(name in getattr(layer, part) for part in layer.adapter_layer_names):
            layer._disable_adapters = False
            layer.set_adapter(name, inference_mode=name != TRAINED)
        else:  # an adapter may cover fewer layers than another
            layer.enable_adapters(False)


@contextmanager
def as_reference(module: nn.Module, name: str | None) -> Iterator[None]:
    """Let the model in training compute as its reference for a while: with an adapter, or as the bare base (None)."""
    activate(module, name)
    try:
        yield
    finally:
        activate(module, TRAINED)


def read_adapter_settings(folder: Path, config: PretrainedConfig) -> peft.LoraConfig:
    """Read an adapter folder's settings and compare them with the base model; reads no weights.

    Raises:
        ConfigError: it is no LoRA adapter of a model with these layers, or one that changes more than linear layers.
    """
    import peft

    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"reference.adapter: {folder} is no folder of a peft adapter (no {CONFIG_FILE}); `dualtok export` of a run "
            "with model.lora writes one"
        )
    try:
        settings: Any = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"reference.adapter: {folder} cannot be read as a peft adapter: {reason}") from None
    if not isinstance(settings, peft.LoraConfig):
        raise ConfigError(f"reference.adapter: {folder} holds a {settings.peft_type} adapter; only LoRA is supported")
    extras = [
        key
        for key in (
            "modules_to_save",
            "use_dora",
            "trainable_token_indices",
            "target_parameters",
            "megatron_config",
        )  # peft imports whatever module it names
        if getattr(settings, key, None)
    ]
    if extras or settings.bias != "none":
        raise ConfigError(
            f"reference.adapter: {folder} changes more than linear layers ({', '.join(extras) or 'bias'}); merge it "
            "into a model of its own (`dualtok export --merge`) and use another reference.mode"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise ConfigError(f"reference.adapter: {folder} has no {WEIGHTS_FILE}")
    missing = sorted(_stored_layers(folder) - _linear_names(empty_causal_lm(config)))
    if missing:
        raise ConfigError(
            f"reference.adapter: {folder} adapts {missing[0]}{_and_more(missing)}, which the model in training does "
            "not have; it belongs to another base"
        )
    return settings


def require_same_base(adapters: Adapters, base: Path) -> None:
    """Refuse a reference's adapter that was trained on another base model than the run starts from.

    Two folders hold the same base if they hold the same tensors, of which the first row of each is compared.

    Args:
        adapters: the run's.
        base: folder of the weights that it starts from.

    Raises:
        ConfigError: names both.
    """
    if adapters.reference is None or not (named := adapters.reference.base_model_name_or_path):
        return
    where = f"reference.adapter: {adapters.reference_folder}/{CONFIG_FILE} names the base {named}"
    try:
        theirs = model_folder(named)
    except ConfigError:
        raise ConfigError(
            f"{where}, which is not there to be compared with {base}; if that is the same model, write its folder into "
            "base_model_name_or_path"
        ) from None
    if theirs.resolve() != base.resolve() and (name := first_difference(theirs, base)) is not None:
        raise ConfigError(f"{where}, but the run starts from {base}, and {name} differs; train an adapter of this base")


def load_adapter(module: nn.Module, folder: Path, *, name: str = REFERENCE, name_of: Names = str) -> None:
    """Copy an adapter's weights from its folder into a module tree that :func:`add_adapter` prepared for it.

    Raises:
        ConfigError: a weight is missing or has another shape.
    """
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        for path, layer in lora_layers(module):
            if name not in layer.lora_A:
                continue
            for part in ("lora_A", "lora_B"):
                key, weight = f"{KEY_PREFIX}{name_of(path)}.{part}.weight", _weight(layer, part, name)
                shape = tuple(file.get_slice(key).get_shape()) if key in names else None
                if shape != tuple(weight.shape):
                    found = "missing" if shape is None else f"of shape {shape}"
                    raise ConfigError(
                        f"reference.adapter: {folder / WEIGHTS_FILE}: {key} is {found}, but the model in training "
                        f"needs {tuple(weight.shape)}; it belongs to another base"
                    )
                weight.copy_(file.get_tensor(key))


def adapter_weights(state: dict[str, Any], name: str = TRAINED, *, norms: Iterable[str] = ()) -> dict[str, Any]:
    """Return an adapter's entries of a model's state dict, under the names that a peft folder has them.

    Args:
        state: of the model.
        name: of the adapter.
        norms: last parts of the names of the normalization layers that are trained with it.
    """
    marks = {f".{part}.{name}.weight": f".{part}.weight" for part in ("lora_A", "lora_B")}
    marks[f".ia3_l.{name}"] = ".ia3_l"
    marks |= {mark: mark for norm in norms for mark in (f".{norm}.weight", f".{norm}.bias")}
    return {
        f"{KEY_PREFIX}{key.removesuffix(mark)}{stored}": value
        for key, value in state.items()
        for mark, stored in marks.items()
        if key.endswith(mark)
    }


def write_adapter(weights: dict[str, torch.Tensor], settings: Path, folder: Path) -> None:
    """Write an adapter folder that ``peft.PeftModel.from_pretrained`` reads.

    Args:
        weights: from :func:`adapter_weights`.
        settings: folder that :func:`save_settings` wrote.
        folder: where to write.
    """
    save_file({name: value.clone() for name, value in weights.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    grant_as_umask_does(folder / WEIGHTS_FILE)
    shutil.copyfile(settings / CONFIG_FILE, folder / CONFIG_FILE)


def save_settings(adapters: Adapters, folder: Path) -> None:
    """Write the settings of the adapter in training, as an exported one has them."""
    adapters.trained.save_pretrained(str(folder))


def _stored_layers(folder: Path) -> set[str]:
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        return {key.removeprefix(KEY_PREFIX).partition(".lora_")[0] for key in file.keys()}  # noqa: SIM118


def _weight(layer: LoraLayer, part: str, name: str) -> torch.Tensor:
    weight: torch.Tensor = getattr(layer, part)[name].weight
    return weight


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Return whether a layer keeps its weight as [in, out], as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
