"""Commands that are one process refuse to be started by a launcher."""

from __future__ import annotations

import os

from dualtok.errors import ConfigError


def refuse_launcher(verb: str) -> None:
    """Keep the ranks of a launcher from doing the work of one process at once, in one folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"`dualtok {verb}` is one process; start it without a launcher")
