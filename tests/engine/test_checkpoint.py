"""A checkpoint is complete or it does not count; pointers never name a torn one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dualtok.engine.checkpoint import find_checkpoint, load_checkpoint, point, prune, save_checkpoint, tag_of
from dualtok.engine.distributed import ALONE, Ranks
from dualtok.engine.layout import Layout, build_layout
from dualtok.errors import CheckpointError


class WritingEngine:
    """Writes files as DeepSpeed would; under test is the protocol around it; tests/distributed has the engine."""

    def __init__(self, fail: bool = False, layout: Layout | None = None) -> None:
        self.fail = fail
        self.layout = layout or build_layout(ALONE)

    def zero_stage(self) -> int:
        return 3

    def save(self, root: Path, tag: str, state: dict[str, Any]) -> None:
        (root / tag / "weights.pt").write_bytes(b"w" * 1000)
        if self.fail:
            raise OSError("disk full")
        torch.save(state, root / tag / "state.pt")

    def load(self, root: Path, tag: str) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(root / tag / "state.pt")
        return state


def save(root: Path, step: int) -> str:
    tag = save_checkpoint(WritingEngine(), root, step, {"step": step})
    point(root, "latest", tag)
    return tag


def test_a_saved_checkpoint_is_found_and_loaded(tmp_path: Path) -> None:
    save(tmp_path, 5)
    saved = find_checkpoint(tmp_path)
    assert (saved.step, saved.tag, saved.world_size, saved.zero_stage) == (5, tag_of(5), 1, 3)
    assert load_checkpoint(WritingEngine(), saved) == {"step": 5}


def test_an_interrupted_save_leaves_the_earlier_one_in_force(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(WritingEngine(fail=True), tmp_path, 10, {"step": 10})
    assert find_checkpoint(tmp_path).step == 5
    point(tmp_path, "latest", tag_of(10))  # as if a torn one had been pointed at
    assert find_checkpoint(tmp_path).step == 5
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        find_checkpoint(tmp_path, tag_of(10))


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove"])
def test_a_damaged_checkpoint_is_refused_and_the_file_named(tmp_path: Path, damage: str) -> None:
    file = tmp_path / save(tmp_path, 5) / "weights.pt"
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(b"w" * 999 if damage == "truncate" else b"w" * 999 + b"x")
    with pytest.raises(CheckpointError, match=r"weights\.pt: missing or altered"):
        find_checkpoint(tmp_path)


def test_pruning_keeps_what_the_pointers_name(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    point(tmp_path, "best", tag_of(2))
    prune(tmp_path)
    assert sorted(folder.name for folder in tmp_path.glob("step-*")) == [tag_of(2), tag_of(4)]


def test_another_number_of_ranks_is_refused_with_the_numbers(tmp_path: Path) -> None:
    save(tmp_path, 5)
    two = build_layout(Ranks(0, 2, torch.device("cpu")))
    with pytest.raises(CheckpointError, match=r"written by 1 rank .* this job has 2"):
        load_checkpoint(WritingEngine(layout=two), find_checkpoint(tmp_path))


def test_another_number_of_stages_is_refused_with_the_numbers(tmp_path: Path) -> None:
    save(tmp_path, 5)
    layout = replace(build_layout(ALONE), stages=2)
    with pytest.raises(CheckpointError, match=r"this job has 1 rank in 2 pipeline stages"):
        load_checkpoint(WritingEngine(layout=layout), find_checkpoint(tmp_path))


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint 'latest'"):
        find_checkpoint(tmp_path)
