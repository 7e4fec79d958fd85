"""Errors meant for the person at the terminal: what was wrong, where, and what to do next.

The command line prints a :class:`DualtokError` as one line without a traceback and exits with status 2.
Anything else is a bug of dualtok's own and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import sys
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class DualtokError(Exception):
    """Base of every error that a user can fix. ``str(error)`` is one line naming the place and the next step."""


class ConfigError(DualtokError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one."""


class DataError(DualtokError):
    """A corpus, shard, tokenizer or score file is missing, malformed, altered, or does not fit the rest."""


class CheckpointError(DualtokError):
    """A checkpoint or model directory is missing, incomplete or does not fit the run."""


def print_to_stderr(line: str) -> None:
    """Print a line to standard error if anybody still reads it.

    When a launcher or a connection has gone, so has the other end of the pipe. That must not keep a process from its
    end.
    """
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest known name, or ``""`` if nothing is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


PREEMPTED = 75
"""Exit status of a preempted run: the system's "temporary failure, try again"."""


class Preempted(Exception):  # noqa: N818  # nothing went wrong
    """The run ended early because it was asked to; its message says where it stands."""
