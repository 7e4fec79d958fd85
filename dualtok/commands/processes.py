"""Which of a launcher's processes does what."""

from __future__ import annotations

import os

from dualtok.errors import ConfigError


def refuse_launcher(verb: str) -> None:
    """Keep the ranks of a launcher from doing the work of one process at once, in one folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"`dualtok {verb}` is one process; start it without a launcher")


def is_first_rank() -> bool:
    """Return whether this process is the one that talks to the terminal."""
    return os.environ.get("RANK", "0") == "0"
