"""A checkpoint is complete or it does not count; pointers never name a torn one; any layout reads what any wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dualtok.distributed.layout import Layout, build_layout
from dualtok.distributed.ranks import ALONE, Ranks
from dualtok.errors import CheckpointError
from dualtok.train.checkpoints.files import write_part
from dualtok.train.checkpoints.manifest import read_manifest, tag_of
from dualtok.train.checkpoints.writer import CheckpointWriter, find_checkpoint, load_checkpoint, point, prune
from dualtok.train.engines.states import KINDS, ParameterSlice

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VALUES = {kind: torch.arange(6.0) + 10 * number for number, kind in enumerate(KINDS)}


def piece(start: int, stop: int, name: str = "w") -> ParameterSlice:
    return ParameterSlice(name, (2, 3), start, {kind: values[start:stop].clone() for kind, values in VALUES.items()})


class Vector:
    """States of an engine with one parameter [2, 3]; under test is the protocol around them; tests/distributed has the
    engines."""

    def __init__(self, fail: bool = False) -> None:
        self.fail = fail
        self.filled: dict[str, torch.Tensor] = {}

    def optimizer_steps(self) -> int:
        return 4

    def pieces(self) -> Iterator[ParameterSlice]:
        yield piece(0, 4)
        if self.fail:
            raise OSError(28, "No space left on device")
        yield piece(4, 6)

    def fill(self, source: Any, *, steps: int, skipped: int) -> None:
        self.steps, self.skipped = steps, skipped
        self.filled = {kind: source.read("w", kind, 1, 4) for kind in KINDS}


class OneVectorEngine:
    def __init__(self, fail: bool = False, layout: Layout | None = None) -> None:
        self.layout = layout or build_layout(ALONE)
        self.vector = Vector(fail)

    def zero_stage(self) -> int:
        return 3

    def states(self) -> Vector:
        return self.vector


def save(root: Path, step: int, *, best: bool = False, keep: int = 1, background: bool = False, **engine: Any) -> None:
    writer = CheckpointWriter(root, {"seed": 3}, keep=keep, background=background)
    writer.save(OneVectorEngine(**engine), step, {"step": step}, best=best)  # type: ignore[arg-type]
    writer.wait()


@pytest.mark.parametrize("background", [False, True])
def test_a_saved_checkpoint_is_found_and_loaded(tmp_path: Path, background: bool) -> None:
    save(tmp_path, 5, background=background)
    saved = find_checkpoint(tmp_path)
    manifest = saved.manifest
    assert (manifest.step, manifest.layout, manifest.run) == (5, "1 rank with ZeRO stage 3", {"seed": 3})
    assert manifest.versions.keys() == {"python", "dualtok", "torch", "deepspeed", "transformers"}
    engine = OneVectorEngine()
    assert load_checkpoint(engine, saved) == {"step": 5}  # type: ignore[arg-type]
    assert (engine.vector.steps, engine.vector.skipped) == (5, 1)
    for kind, values in VALUES.items():  # across the border of the two pieces
        assert torch.equal(engine.vector.filled[kind], values[1:5])
    assert torch.equal(saved.reader().whole("w"), VALUES["weight"].view(2, 3))
    assert not list(saved.folder.glob("part-*"))


def test_the_parts_of_several_ranks_become_one(tmp_path: Path) -> None:
    for rank, part in ((1, piece(2, 6)), (0, piece(0, 2))):
        write_part(tmp_path, rank, [part])
    facts: dict[str, Any] = {"ranks": 2, "step": 1, "optimizer_steps": 1, "layout": "", "state": {}, "run": {}}
    from dualtok.train.checkpoints.files import CheckpointReader, finalize

    finalize(tmp_path, **facts)
    assert torch.equal(CheckpointReader(tmp_path, read_manifest(tmp_path)).whole("w").flatten(), VALUES["weight"])
    for rank, part in ((1, piece(3, 6)), (0, piece(0, 2))):
        write_part(tmp_path, rank, [part])
    with pytest.raises(CheckpointError, match="with gaps"):
        finalize(tmp_path, **facts)


@pytest.mark.parametrize("background", [False, True])
def test_an_interrupted_save_leaves_the_earlier_one_in_force(tmp_path: Path, background: bool) -> None:
    save(tmp_path, 5)
    with pytest.raises((CheckpointError, OSError), match="No space left on device"):
        save(tmp_path, 10, fail=True, background=background)
    assert find_checkpoint(tmp_path).manifest.step == 5
    point(tmp_path, "latest", tag_of(10))  # as if a torn one had been pointed at
    assert find_checkpoint(tmp_path).manifest.step == 5
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        find_checkpoint(tmp_path, tag_of(10))


@pytest.mark.parametrize("where", ["write_part", "finalize"])
def test_what_fails_in_the_background_is_raised_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    save(tmp_path, 5)
    writer = CheckpointWriter(tmp_path, {}, background=True)
    with monkeypatch.context() as changed:
        changed.setattr(f"dualtok.train.checkpoints.writer.{where}", full)
        writer.save(OneVectorEngine(), 10, {})  # type: ignore[arg-type]
        with pytest.raises(OSError, match="No space left"):
            writer.wait()
    writer.check()  # once is enough
    assert find_checkpoint(tmp_path).manifest.step == 5
    writer.save(OneVectorEngine(), 15, {})  # type: ignore[arg-type]
    writer.wait()
    assert find_checkpoint(tmp_path).manifest.step == 15


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove"])
def test_a_damaged_checkpoint_is_refused_and_the_file_named(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 5)
    file = next((tmp_path / tag_of(5)).glob("states-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "alter" else content[:-1])
    with pytest.raises(CheckpointError, match=rf"{file.name}: missing or altered"):
        find_checkpoint(tmp_path)


def test_pruning_keeps_what_the_pointers_name_and_the_last_ones(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, best=step == 2, keep=2)
    (tmp_path / tag_of(3)).mkdir()  # torn
    prune(tmp_path, 2)
    assert sorted(folder.name for folder in tmp_path.glob("step-*")) == [tag_of(step) for step in (2, 4, 5)]


def test_a_manifest_of_another_version_or_with_a_path_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = tmp_path / tag_of(5) / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "format_version": 1}))
    with pytest.raises(CheckpointError, match="format version 1, this dualtok reads 2"):
        find_checkpoint(tmp_path)
    (name,) = values["files"]
    path.write_text(json.dumps(values).replace(name, f"../{name}"))
    with pytest.raises(CheckpointError, match=r"manifest\.json: unreadable"):
        find_checkpoint(tmp_path)


def test_another_layout_reads_it_and_another_model_does_not(tmp_path: Path) -> None:
    save(tmp_path, 5, layout=replace(build_layout(Ranks(0, 1, torch.device("cpu"))), stages=2))
    saved = find_checkpoint(tmp_path)
    assert saved.manifest.layout == "1 rank in 2 pipeline stages with ZeRO stage 3"
    load_checkpoint(OneVectorEngine(), saved)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="has no parameter 'v'"):
        saved.reader().read("v", "weight", 0, 1)
    with pytest.raises(CheckpointError, match=r"'w' has shape \[2, 3\], smaller"):
        saved.reader().read("w", "weight", 0, 7)


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint 'latest'"):
        find_checkpoint(tmp_path)
