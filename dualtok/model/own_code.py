"""Models that bring Python code of their own (``auto_map`` in ``config.json``): it runs only where a run asks for it.

transformers runs such code when it is told to, and where it is told nothing it asks at the terminal; dualtok always
tells it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualtok.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

REMOTE = "transformers_modules"
"""The package that transformers makes of such code."""


def has_own_class(config: PretrainedConfig) -> bool:
    """Return whether a configuration was read by its model's own code, which must have been trusted then."""
    return type(config).__module__.partition(".")[0] == REMOTE


def needs_own_code(error: Exception) -> bool:
    """Return whether transformers failed only because it was not allowed to run a model's own code."""
    return "trust_remote_code" in str(error)


def refusal(path: str | Path, setting: str) -> ConfigError:
    """Return the error that says how to allow a model's own code."""
    return ConfigError(
        f"{path}: brings Python code of its own (auto_map in config.json), which was not run; read that code, and set "
        f"{setting}: true if you trust it"
    )
