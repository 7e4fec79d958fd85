"""kill -9 at random moments of a preparation, of a part and of the end: the same bytes after all, and nothing astray.

``DUALTOK_SOAK=20 pytest tests/data/prepare/test_killed.py`` does it with 20 seeds.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from dualtok.data.prepare.parts import Part
from dualtok.data.prepare.pipeline import STAGING
from tests.data.prepare.preparing import child, contents, finish, kill, section_of, settings_of
from tests.warm import fork_of

SEEDS = range(int(os.environ.get("DUALTOK_SOAK", "1")))
SLOW_DISK = 0.02
PROCESSES = 2


def kill_at(section: dict[str, Any], verb: str, write: int, draw: random.Random) -> bool:
    """Start a preparation and kill it somewhere within its n-th write to the disk; return whether it came so far."""
    process = child(section, verb, delay=SLOW_DISK)
    assert process.stdout is not None
    seen = process.stdout.read(write)
    if seen.count(".") < write:
        assert process.wait(timeout=60) == 0, process.communicate()
        return False
    workers = children(fork_of(process.pid))
    time.sleep(draw.uniform(0, 2 * SLOW_DISK))
    assert process.poll() is None, "it ended before it could be killed"
    kill(process)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.01)
    return True


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def killed_and_finished(section: dict[str, Any], verb: str, kills: int, writes: range, draw: random.Random) -> int:
    """Kill a preparation so many times, each later than the last at random, then let it end; return the true kills."""
    done = sum(kill_at(section, verb, draw.choice(writes), draw) for _ in range(kills))
    finish(child(section, verb))
    return done


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_preparation_killed_at_random_moments_gives_the_same_bytes(prepared: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    section = section_of(settings_of(tmp_path / "prepared", prepared.parent / "texts.jsonl"))
    # About 400 writes in all; each start goes on with those that are left.
    assert killed_and_finished(section, "prepare", 3, range(1, 130), draw) == 3
    assert contents(tmp_path / "prepared") == contents(prepared)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_parts_and_their_end_killed_at_random_moments_give_the_same_bytes(
    prepared: Path, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(100 + seed)
    folder = tmp_path / "prepared"
    section = section_of(settings_of(folder, prepared.parent / "texts.jsonl"))
    killed = sum(killed_and_finished(section, f"{number}/2", 1, range(1, 11), draw) for number in (1, 2))
    assert killed == 2
    assert not list(Part(1, 2).folder(folder / STAGING).glob(".*.tmp"))
    assert killed_and_finished(section, "finish", 2, range(1, 180), draw) == 2
    assert contents(folder) == contents(prepared)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_workers_end_with_a_killed_preparation(prepared: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(200 + seed)
    config = settings_of(tmp_path / "prepared", prepared.parent / "texts.jsonl", processes=PROCESSES)
    assert killed_and_finished(section_of(config), "prepare", 1, range(8, 50), draw) == 1
    assert contents(tmp_path / "prepared") == contents(prepared)
