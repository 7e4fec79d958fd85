"""What a complete checkpoint says of itself: names of its files and ``manifest.json``; read without torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dualtok.errors import CheckpointError
from dualtok.files import FileName

if TYPE_CHECKING:
    from pathlib import Path


MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
FORMAT_VERSION = 2


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class FileEntry(_Entry):
    """One file of a checkpoint."""

    bytes: int
    crc32: int


class ParameterEntry(_Entry):
    """One parameter of the whole model."""

    shape: tuple[int, ...]
    pieces: list[tuple[FileName, int, int]]
    """File, start and length in the flattened parameter; ascending, without gaps."""


class CheckpointManifest(_Entry):
    """``manifest.json``."""

    format_version: int = FORMAT_VERSION
    step: int
    optimizer_steps: int
    """Steps that changed the weights."""
    layout: str
    """The layout that wrote it, in words."""
    state: dict[str, Any]
    """The training loop's state."""
    run: dict[str, Any]
    """The run's settings."""
    versions: dict[str, str]
    parameters: dict[str, ParameterEntry]
    files: dict[FileName, FileEntry]


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read a complete checkpoint's manifest.

    Raises:
        CheckpointError: it is not complete, malformed, or of another version.
    """
    path = folder / MANIFEST
    if not (folder / COMPLETE).is_file():
        raise CheckpointError(f"{folder}: not a complete checkpoint (no {COMPLETE}); it was interrupted while written")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values.get("format_version", 1)
        if found != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {found}, this dualtok reads {FORMAT_VERSION}; resume with the version that "
                "wrote it, or start a new run"
            )
        return CheckpointManifest.model_validate(values)
    except (OSError, ValueError, AttributeError, ValidationError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path}: unreadable ({reason}); choose another checkpoint") from None


LATEST = "latest"
BEST = "best"


def tag_of(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(tag: str) -> int:
    """Return the step of a checkpoint, from its folder name."""
    return int(tag.removeprefix("step-"))
