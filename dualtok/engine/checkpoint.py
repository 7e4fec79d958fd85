"""Checkpoints that are either complete or not there, and the pointers ``latest`` and ``best``.

DeepSpeed writes the tensors; a checkpoint counts only once ``manifest.json`` lists every file with its size and CRC-32
and the empty file ``COMPLETE`` is there. The pointers are replaced atomically, after that.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtok.engine.distributed import ALONE
from dualtok.errors import CheckpointError
from dualtok.files import sync_folder, write_text

if TYPE_CHECKING:
    from dualtok.engine.distributed import Ranks
    from dualtok.engine.protocol import TrainingEngine

COMPLETE = "COMPLETE"
MANIFEST = "manifest.json"
STATE_KEY = "dualtok"
STAGES_FILE = "stages.json"
"""Where a pipeline's checkpoint says which decoder layers each stage holds."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint on disk."""

    folder: Path
    tag: str
    step: int
    world_size: int
    zero_stage: int
    stages: int
    """Pipeline stages."""

    @property
    def layout(self) -> str:
        """The layout that wrote it, in words."""
        return describe_layout(self.world_size, self.zero_stage, self.stages)


def describe_layout(world_size: int, zero_stage: int, stages: int) -> str:
    """Return ranks, pipeline stages and ZeRO stage in words."""
    pipeline = f" in {stages} pipeline stages" if stages > 1 else ""
    return f"{world_size} rank{'s' * (world_size > 1)}{pipeline} with ZeRO stage {zero_stage}"


def tag_of(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def save_deepspeed(engine: Any, root: Path, tag: str, state: dict[str, Any]) -> None:
    """Let a DeepSpeed engine write its tensors and the loop's state."""
    # One key of our own: DeepSpeed merges client_state into its top level, where 'module' would overwrite the weights.
    engine.save_checkpoint(str(root), tag=tag, client_state={STATE_KEY: state}, save_latest=False)


def load_deepspeed(engine: Any, root: Path, tag: str) -> dict[str, Any] | None:
    """Let a fresh DeepSpeed engine read its tensors; return the loop's state, or None when it could not."""
    path, client_state = engine.load_checkpoint(str(root), tag=tag)
    if path is None or STATE_KEY not in (client_state or {}):
        return None
    return dict(client_state[STATE_KEY])


def save_checkpoint(engine: TrainingEngine, root: Path, step: int, state: dict[str, Any]) -> str:
    """Write a checkpoint of an engine and mark it complete; every rank takes part.

    Args:
        engine: the model in training.
        root: folder of all checkpoints, shared by all ranks.
        step: optimiser steps done.
        state: what the loop needs to go on, independent of rank and world size.

    Returns:
        The checkpoint's tag.
    """
    tag = tag_of(step)
    folder = root / tag
    ranks = engine.layout.ranks
    ranks.first_does(lambda: _clear(folder))
    engine.save(root, tag, state)
    ranks.barrier()
    names = ranks.first_does(lambda: sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))
    mine = {name: _describe(folder / name) for name in names[ranks.rank :: ranks.world_size]}
    files = {name: entry for part in ranks.gather_objects(mine) for name, entry in part.items()}
    manifest = {
        "step": step,
        "world_size": ranks.world_size,
        "zero_stage": engine.zero_stage(),
        "stages": engine.layout.stages,
        "files": dict(sorted(files.items())),
    }
    ranks.first_does(lambda: _seal(folder, manifest))
    return tag


def point(root: Path, name: str, tag: str) -> None:
    """Let the pointer ``latest`` or ``best`` name a complete checkpoint."""
    write_text(root / name, tag)


def prune(root: Path) -> None:
    """Remove checkpoints that neither ``latest`` nor ``best`` names."""
    kept = {_pointed(root, "latest"), _pointed(root, "best")}
    for folder in root.glob("step-*"):
        if folder.name not in kept:
            (folder / COMPLETE).unlink(missing_ok=True)  # first, so that a half-removed one never counts
            shutil.rmtree(folder)


def find_checkpoint(root: Path, which: str = "latest", ranks: Ranks = ALONE) -> SavedCheckpoint:
    """Return the complete checkpoint that a pointer names; ``latest`` falls back to the newest complete one.

    Args:
        root: folder of all checkpoints.
        which: ``latest``, ``best`` or a tag.
        ranks: share the reading of the files; all get the same answer.

    Raises:
        CheckpointError: there is none, or it is incomplete or altered.
    """
    problem = f"{root}: no checkpoint {which!r}"
    for candidate in ranks.first_does(lambda: _candidates(root, which)):
        try:
            return _verified(root / candidate, ranks)
        except CheckpointError as error:
            problem = str(error)
    raise CheckpointError(problem)


def load_checkpoint(engine: TrainingEngine, saved: SavedCheckpoint) -> dict[str, Any]:
    """Load a complete checkpoint into a fresh engine and return the loop's state.

    Raises:
        CheckpointError: it was written by another number of ranks or stages, or DeepSpeed cannot read it.
    """
    here = describe_layout(engine.layout.ranks.world_size, engine.zero_stage(), engine.layout.stages)
    if saved.layout != here:
        raise CheckpointError(
            f"{saved.folder}: written by {saved.layout}, but this job has {here}; resume with the same, or start from "
            "`dualtok export`ed weights"
        )
    state = engine.load(saved.folder.parent, saved.tag)
    if state is None:
        raise CheckpointError(f"{saved.folder}: DeepSpeed could not load it; choose another checkpoint")
    return state


def _clear(folder: Path) -> None:
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _describe(path: Path) -> dict[str, int]:
    """Return size and CRC-32 of a file after forcing it to disk."""
    checksum = 0
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        while block := stream.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}


def _seal(folder: Path, manifest: dict[str, Any]) -> None:
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    write_text(folder / COMPLETE, "")
    sync_folder(folder.parent)


def _pointed(root: Path, name: str) -> str | None:
    try:
        return (root / name).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def _candidates(root: Path, which: str) -> list[str]:
    tag = _pointed(root, which) if which in ("latest", "best") else which
    newest_first = sorted((folder.name for folder in root.glob("step-*")), reverse=True) if which == "latest" else []
    return [*([tag] if tag else []), *newest_first]


def _verified(folder: Path, ranks: Ranks) -> SavedCheckpoint:
    manifest = ranks.first_does(lambda: _read_manifest(folder))
    files: dict[str, dict[str, int]] = manifest.pop("files")
    mine = sorted(files)[ranks.rank :: ranks.world_size]
    altered = [name for name in mine if not _is_as_written(folder / name, files[name])]
    everywhere = sorted(name for part in ranks.gather_objects(altered) for name in part)
    if everywhere:
        raise CheckpointError(
            f"{folder / everywhere[0]}: missing or altered since it was written; choose another checkpoint"
        )
    return SavedCheckpoint(folder, folder.name, **manifest)


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / COMPLETE).is_file():
        raise CheckpointError(f"{folder}: not a complete checkpoint (no {COMPLETE}); it was interrupted while written")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {key: manifest[key] for key in ("step", "world_size", "zero_stage", "stages", "files")}
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: unreadable ({error}); choose another checkpoint") from None


def _is_as_written(path: Path, entry: dict[str, int]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and _describe(path) == entry
