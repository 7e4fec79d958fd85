"""Checkpoints that are either complete or not there, the pointers ``latest`` and ``best``, and which ones are kept.

A checkpoint counts only once its manifest lists every file and ``COMPLETE`` is there; the pointers are replaced
atomically, after that. Writing can go on in the background: then each rank copies its values into host memory, and a
thread writes them while training continues. No collective is needed for that: rank 0's thread waits for the files of
the others.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dualtok.distributed.ranks import ALONE
from dualtok.errors import CheckpointError
from dualtok.files import write_text
from dualtok.train.checkpoints.files import CheckpointReader, finalize, is_as_written, is_written, write_part
from dualtok.train.checkpoints.manifest import BEST, COMPLETE, LATEST, CheckpointManifest, read_manifest, tag_of

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.distributed.ranks import Ranks
    from dualtok.train.engines.base import TrainingEngine


POLL_SECONDS = 0.1
"""Between two looks of rank 0 for the other ranks' files, while it writes in the background."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint on disk, its files compared with its manifest."""

    folder: Path
    manifest: CheckpointManifest

    def reader(self) -> CheckpointReader:
        """Return what reads its values."""
        return CheckpointReader(self.folder, self.manifest)


def describe_layout(world_size: int, zero_stage: int, stages: int) -> str:
    """Return ranks, pipeline stages and ZeRO stage in words."""
    pipeline = f" in {stages} pipeline stages" if stages > 1 else ""
    return f"{world_size} rank{'s' * (world_size > 1)}{pipeline} with ZeRO stage {zero_stage}"


class CheckpointWriter:
    """Writes the checkpoints of one run.

    Args:
        root: folder of all checkpoints, shared by all ranks.
        run: the run's settings, kept in each checkpoint.
        keep: how many of the last checkpoints stay; the best one always does.
        background: write while training goes on; costs the memory of a copy of the rank's states on the host.
    """

    def __init__(self, root: Path, run: dict[str, Any], *, keep: int = 1, background: bool = False) -> None:
        self._root, self._run, self._keep, self._background = root, run, keep, background
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(self, engine: TrainingEngine, step: int, state: dict[str, Any], *, best: bool = False) -> None:
        """Write a checkpoint, or begin to; every rank takes part.

        Args:
            engine: the model in training.
            step: optimizer steps done.
            state: what the loop needs to go on, independent of rank and world size.
            best: whether it becomes the one that ``best`` names.

        Raises:
            CheckpointError: a file cannot be written; every rank raises it. What failed in the background is raised by
                the next call of :meth:`save`, :meth:`check` or :meth:`wait`.
        """
        layout, states = engine.layout, engine.states()
        ranks, folder = layout.ranks, self._root / tag_of(step)
        ranks.together(self.wait)
        ranks.first_does(lambda: _clear(folder))
        facts: dict[str, Any] = {
            "ranks": ranks.world_size,
            "step": step,
            "optimizer_steps": states.optimizer_steps(),
            "state": state,
            "layout": describe_layout(ranks.world_size, engine.zero_stage(), layout.stages),
            "run": self._run,
        }

        def finish() -> None:
            finalize(folder, **facts)
            if best:
                point(self._root, BEST, folder.name)
            point(self._root, LATEST, folder.name)
            prune(self._root, self._keep)

        if not self._background:
            ranks.together(lambda: write_part(folder, ranks.rank, states.pieces()))
            ranks.first_does(finish)
            return
        copies = list(states.pieces())

        def work() -> None:
            try:
                write_part(folder, ranks.rank, copies)
                if ranks.is_first:
                    while not is_written(folder, ranks.world_size):
                        time.sleep(POLL_SECONDS)
                    finish()
            except Exception as error:
                self._failure = error

        self._thread = threading.Thread(target=work, name="dualtok-checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what failed in the background, if anything did."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Wait until the last checkpoint is written; on rank 0 until it is complete."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()


def point(root: Path, name: str, tag: str) -> None:
    """Let the pointer ``latest`` or ``best`` name a complete checkpoint."""
    write_text(root / name, tag)


def complete_checkpoints(root: Path) -> list[str]:
    """Return the tags of all complete checkpoints, the oldest first."""
    return sorted(folder.name for folder in root.glob("step-*") if (folder / COMPLETE).is_file())


def prune(root: Path, keep: int = 1) -> None:
    """Remove all checkpoints but the last ``keep`` complete ones and those that ``latest`` and ``best`` name."""
    complete = complete_checkpoints(root)
    kept = {_pointed(root, LATEST), _pointed(root, BEST), *complete[-keep:]}
    for folder in root.glob("step-*"):
        if folder.name not in kept:
            (folder / COMPLETE).unlink(missing_ok=True)  # first, so that a half-removed one never counts
            shutil.rmtree(folder)


def find_checkpoint(root: Path, which: str = LATEST, ranks: Ranks = ALONE) -> SavedCheckpoint:
    """Return the complete checkpoint that a pointer names; ``latest`` falls back to the newest good one.

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
    """Fill a fresh engine of any layout from a checkpoint and return the loop's state.

    Raises:
        CheckpointError: it belongs to another model.
    """
    manifest, reader = saved.manifest, saved.reader()
    skipped = manifest.step - manifest.optimizer_steps
    engine.layout.ranks.together(lambda: engine.states().fill(reader, steps=manifest.step, skipped=skipped))
    return dict(manifest.state)


def _clear(folder: Path) -> None:
    try:
        (folder / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be made: {error.strerror or error}; fix the folder or change output_dir, then resume"
        ) from None


def _pointed(root: Path, name: str) -> str | None:
    try:
        return (root / name).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def _candidates(root: Path, which: str) -> list[str]:
    tag = _pointed(root, which) if which in (LATEST, BEST) else which
    if tag is not None and re.fullmatch(r"step-\d+", tag) is None:
        raise CheckpointError(f"{root}: {tag!r} is no checkpoint's name; choose latest, best or one like {tag_of(100)}")
    newest_first = sorted((folder.name for folder in root.glob("step-*")), reverse=True) if which == LATEST else []
    return [*([tag] if tag else []), *newest_first]


def _verified(folder: Path, ranks: Ranks) -> SavedCheckpoint:
    manifest: CheckpointManifest = ranks.first_does(lambda: read_manifest(folder))
    mine = sorted(manifest.files)[ranks.rank :: ranks.world_size]
    altered = [name for name in mine if not is_as_written(folder / name, manifest.files[name])]
    everywhere = sorted(name for part in ranks.gather_objects(altered) for name in part)
    if everywhere:
        raise CheckpointError(
            f"{folder / everywhere[0]}: missing or altered since it was written; choose another checkpoint"
        )
    return SavedCheckpoint(folder, manifest)
