"""The shapes of a run's models: from their settings alone where the architecture is well known, else from transformers.

Most runs are of a well-known architecture, and are planned without torch and transformers, which take seconds to
import. Anything out of the ordinary, mistakes among it, is transformers' to read and to refuse.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dualtok.commands.quiet import quiet_libraries
from dualtok.errors import ConfigError, did_you_mean
from dualtok.plan.known_settings import known_settings, read_known_settings
from dualtok.plan.known_shapes import known_shape, parameters_of
from dualtok.plan.shape import ModelShape, read_shape
from dualtok.plan.shapes import NAMED, named

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dualtok.config.model import ModelConfig

# Imported where they are used, for what they take to load: transformers (1 to 4 s), and dualtok.model.load and
# dualtok.model.adapters, which import torch (1 s) and peft (3 s).

ADAPTER_FILE = "adapter_config.json"
"""A folder with it is no model's: :func:`dualtok.model.load.read_model_config` refuses it."""


class Shapes(NamedTuple):
    """Of one model."""

    trained: ModelShape
    """With the adapters that the run trains."""
    plain: ModelShape
    """Without any."""


def shapes_of(model: ModelConfig, vocabulary: int) -> Shapes:
    """Return the shapes of the model that a run trains.

    Args:
        model: the run's section.
        vocabulary: rows that the tokenizer needs, used where ``model.config`` leaves ``vocab_size`` out.

    Raises:
        ConfigError: the model is neither a folder, nor a known name, nor on the hub; or its settings are wrong.
    """
    return _from_settings(model, vocabulary) or built_shapes(model, vocabulary)


def reference_shape(path: str) -> ModelShape | None:
    """Return the shape of a reference model; None where it is neither a folder with a config.json nor a known name."""
    if (Path(path) / "config.json").is_file():
        settings = read_known_settings(Path(path))
    elif (by_name := named(path)) is not None:
        settings = known_settings(by_name)
    else:
        return None
    if settings is not None:
        return known_shape(settings)
    quiet_libraries()
    return _read_shape(_config_at(path))


def _from_settings(model: ModelConfig, vocabulary: int) -> Shapes | None:
    """Return a model's shapes where its settings are understood without transformers."""
    if model.path is None:
        settings = known_settings({"vocab_size": vocabulary, **(model.config or {})})
    elif (Path(model.path) / "config.json").is_file():
        adapter = (Path(model.path) / ADAPTER_FILE).is_file()
        settings = None if adapter else read_known_settings(Path(model.path))
    else:
        settings = known_settings(named(model.path) or {})
    if settings is None:
        return None
    plain = known_shape(settings)
    if model.ia3 is not None:
        return None
    if model.lora is None:
        return Shapes(plain, plain)
    known = parameters_of(settings).targets()
    targets = model.lora.targets or known
    if not set(targets) <= set(known):
        return None
    return Shapes(known_shape(settings, rank=model.lora.rank, targets=targets), plain)


def built_shapes(model: ModelConfig, vocabulary: int) -> Shapes:
    """Return the shapes of the model that transformers builds, for any architecture; arguments as :func:`shapes_of`.

    Raises:
        ConfigError: as :func:`shapes_of`; or ``model.lora.targets`` names an unknown layer.
    """
    quiet_libraries()
    config = _planned_config(model, vocabulary)
    plain = _read_shape(config)
    kind = model.adapter
    if kind is None:
        return Shapes(plain, plain)
    from dualtok.model.adapters import adapter_settings

    settings = adapter_settings(kind, config)
    targets: Any = settings.target_modules
    rank = 0 if model.lora is None else model.lora.rank
    scaled = (*targets, *(settings.modules_to_save or ())) if model.lora is None else ()
    return Shapes(_read_shape(config, rank=rank, targets=tuple(targets), scaled=scaled), plain)


def _read_shape(
    config: PretrainedConfig, *, rank: int = 0, targets: tuple[str, ...] = (), scaled: tuple[str, ...] = ()
) -> ModelShape:
    try:
        return read_shape(config, rank=rank, targets=targets, scaled=scaled)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _planned_config(model: ModelConfig, vocabulary: int) -> PretrainedConfig:
    """Return a model's configuration: of its folder, of the table of known names, or of the hub."""
    from dualtok.model.load import starting_config

    if model.path is None or (Path(model.path) / "config.json").is_file():
        return starting_config(model, vocabulary)
    if named(model.path) is not None:
        return _config_at(model.path)
    try:
        return starting_config(model, vocabulary)
    except ConfigError as error:
        raise ConfigError(
            f"{error}{did_you_mean(model.path, NAMED)}; to plan, a folder with nothing but its config.json is enough"
        ) from None


def _config_at(path: str) -> PretrainedConfig:
    from transformers import AutoConfig

    settings = named(path)
    if settings is None or (Path(path) / "config.json").is_file():
        config: PretrainedConfig = AutoConfig.from_pretrained(path)
        return config
    named_config: PretrainedConfig = AutoConfig.for_model(**settings)
    return named_config
