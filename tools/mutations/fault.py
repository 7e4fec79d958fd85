"""What a seeded fault is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A small edit of one source file that changes what the package does."""

    name: str
    """Short and unique; given to ``--only``."""

    file: str
    """Path below the root of the tree."""

    old: str
    """Text that occurs exactly once in the file."""

    new: str
    """What takes its place."""

    what: str
    """The fault in one line."""

    tests: tuple[str, ...]
    """Tests that should fail, as pytest takes them."""

    survives: str = ""
    """Why it is accepted that no test fails; empty where one must."""
