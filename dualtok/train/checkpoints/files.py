"""The files of a checkpoint: what each rank writes, the manifest that makes them one, and reading values back.

    checkpoints/step-00000100/
      states-00003-000.safetensors   pieces of parameters and moments from rank 3, float32
      part-00003.json                what rank 3 wrote; taken up by the manifest, then removed
      manifest.json                  every parameter's pieces, every file's size and CRC-32, the loop's state, versions
      COMPLETE                       empty; written last

Any layout can read what any other wrote. Nothing is pickled.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from dualtok.errors import CheckpointError
from dualtok.files import FileName, atomic_file, sync_folder, write_text
from dualtok.train.checkpoints.manifest import COMPLETE, MANIFEST, CheckpointManifest, FileEntry, ParameterEntry, _Entry
from dualtok.train.engines.states import KINDS
from dualtok.versions import installed_versions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from dualtok.train.engines.states import ParameterSlice


FILE_BYTES = 1 << 28
"""Size from which a rank begins another file: what writing and reading hold in memory beside the values."""
PACKAGES = ("torch", "deepspeed", "transformers")


class Part(_Entry):
    """What one rank wrote."""

    files: dict[FileName, FileEntry]
    pieces: list[tuple[str, tuple[int, ...], FileName, int, int]]
    """Parameter, its shape, file, start and length of the piece."""


def write_part(folder: Path, rank: int, pieces: Iterable[ParameterSlice]) -> None:
    """Write one rank's pieces and, last, the record of them.

    Raises:
        CheckpointError: a file cannot be written.
    """
    files: dict[str, FileEntry] = {}
    positions: list[tuple[str, tuple[int, ...], str, int, int]] = []
    try:
        for number, group in enumerate(_batches(pieces)):
            name = f"states-{rank:05d}-{number:03d}.safetensors"
            content = save(
                {_key(kind, piece.start, piece.name): piece.values[kind] for piece in group for kind in KINDS}
            )
            with atomic_file(folder / name) as stream:
                stream.write(content)
            files[name] = FileEntry(bytes=len(content), crc32=zlib.crc32(content))
            positions += [(piece.name, piece.shape, name, piece.start, piece.length) for piece in group]
        write_text(_part_path(folder, rank), Part(files=files, pieces=positions).model_dump_json())
    except OSError as error:
        raise CheckpointError(
            f"{folder}: rank {rank} cannot write its part of the checkpoint: {error.strerror or error}; free space or "
            "fix the folder, then resume from the last complete checkpoint"
        ) from None


def is_written(folder: Path, ranks: int) -> bool:
    """Return whether every rank has written its part."""
    return all(_part_path(folder, rank).is_file() for rank in range(ranks))


def finalize(
    folder: Path,
    *,
    ranks: int,
    step: int,
    optimizer_steps: int,
    layout: str,
    state: dict[str, Any],
    run: dict[str, Any],
) -> None:
    """Turn the parts of all ranks into one checkpoint and mark it complete.

    Raises:
        CheckpointError: the parts leave a gap in a parameter, or the folder cannot be written.
    """
    parts = [Part.model_validate_json(_part_path(folder, rank).read_bytes()) for rank in range(ranks)]
    manifest = CheckpointManifest(
        step=step,
        optimizer_steps=optimizer_steps,
        layout=layout,
        state=state,
        run=run,
        versions=installed_versions(PACKAGES),
        parameters=_joined(folder, parts),
        files={name: entry for part in parts for name, entry in sorted(part.files.items())},
    )
    try:
        write_text(folder / MANIFEST, manifest.model_dump_json(indent=1))
        write_text(folder / COMPLETE, "")
        for rank in range(ranks):
            _part_path(folder, rank).unlink()
        sync_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be completed: {error.strerror or error}") from None


def is_as_written(path: Path, entry: FileEntry) -> bool:
    """Return whether a file has the size and the CRC-32 that the manifest says."""
    try:
        if path.stat().st_size != entry.bytes:
            return False
        checksum = 0
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                checksum = zlib.crc32(block, checksum)
    except OSError:
        return False
    return checksum == entry.crc32


class CheckpointReader:
    """Values of a complete checkpoint, read from memory-mapped files as they are asked for.

    Args:
        folder: the checkpoint's.
        manifest: its manifest.
    """

    def __init__(self, folder: Path, manifest: CheckpointManifest) -> None:
        self._folder = folder
        self.parameters = manifest.parameters

    def read(self, name: str, kind: str, start: int, length: int) -> torch.Tensor:
        """Return float32 [length] values of a parameter.

        Args:
            name: the parameter's name in the whole model.
            kind: one of :data:`~dualtok.train.engines.states.KINDS`.
            start: place of the first value in the flattened parameter.
            length: number of values.

        Raises:
            CheckpointError: the checkpoint has no such parameter, or it is shorter.
        """
        entry = self.parameters.get(name)
        if entry is None:
            raise CheckpointError(f"{self._folder}: has no parameter {name!r}; it belongs to another model")
        values = torch.empty(length)
        filled = 0
        for file, first, size in entry.pieces:
            begin, end = max(start, first), min(start + length, first + size)
            if begin < end:
                with safe_open(self._folder / file, framework="pt") as content:
                    part = content.get_slice(_key(kind, first, name))[begin - first : end - first]
                values[begin - start : end - start] = part
                filled += end - begin
        if filled != length:
            raise CheckpointError(
                f"{self._folder}: parameter {name!r} has shape {list(entry.shape)}, smaller than this model's"
            )
        return values

    def whole(self, name: str) -> torch.Tensor:
        """Return a parameter's float32 weight in its shape."""
        shape = torch.Size(self.parameters[name].shape)
        return self.read(name, KINDS[0], 0, shape.numel()).view(shape)


def _part_path(folder: Path, rank: int) -> Path:
    return folder / f"part-{rank:05d}.json"


def _key(kind: str, start: int, name: str) -> str:
    return f"{kind}/{start}/{name}"


def _batches(pieces: Iterable[ParameterSlice]) -> Iterator[list[ParameterSlice]]:
    """Group pieces into files of about :data:`FILE_BYTES`."""
    group: list[ParameterSlice] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += piece.length * 4 * len(KINDS)
        if size >= FILE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _joined(folder: Path, parts: Iterable[Part]) -> dict[str, ParameterEntry]:
    """Put the pieces of all ranks together."""
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, list[tuple[str, int, int]]] = {}
    for part in parts:
        for name, shape, file, start, length in part.pieces:
            shapes[name] = shape
            pieces.setdefault(name, []).append((file, start, length))
    for name, found in pieces.items():
        found.sort(key=lambda piece: piece[1])
        ends = [0, *(start + length for _, start, length in found)]
        gap = any(start != end for (_, start, _), end in zip(found, ends, strict=False))
        if gap or ends[-1] != torch.Size(shapes[name]).numel():
            raise CheckpointError(f"{folder}: the ranks wrote {name!r} with gaps; this is a bug, please report it")
    return {name: ParameterEntry(shape=shapes[name], pieces=pieces[name]) for name in sorted(pieces)}
