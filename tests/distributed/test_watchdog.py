"""A process that makes no progress reports where it stands and ends."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from dualtok.distributed.job_record import read_ends
from tests.support import ROOT, python

if TYPE_CHECKING:
    from pathlib import Path

HANGING = """
import sys, time
from pathlib import Path
from dualtok.distributed.watchdog import Watchdog
import dualtok.distributed.watchdog as module
module.GRACE_SECONDS = 0.1

def stuck_here(): time.sleep(60)

with Watchdog(0.6, Path(sys.argv[1]), 3) as watchdog:
    for step in range(4):
        watchdog.beat(f"in step {step}")
        time.sleep(0.3)
    {last}
"""


def run(folder: Path, last: str) -> subprocess.CompletedProcess[str]:
    code = HANGING.replace("{last}", last)
    return subprocess.run(python("-c", code, folder), capture_output=True, text=True, timeout=50, check=False, cwd=ROOT)


def test_a_hang_ends_with_the_stacks_on_disk(tmp_path: Path) -> None:
    started = time.monotonic()
    ended = run(tmp_path / "stacks", "stuck_here()")
    assert ended.returncode == 70
    assert time.monotonic() - started < 30
    assert "rank 3: no progress for 1 s while in step 3; its main thread is in stuck_here" in ended.stderr
    assert "stuck_here" in (tmp_path / "stacks" / "rank-00003.txt").read_text()


@pytest.mark.parametrize("broken", ["pipe", "folder"])
def test_a_hang_ends_even_if_it_cannot_be_reported(tmp_path: Path, broken: str) -> None:
    """The launcher that read what the rank says is gone, or the stacks cannot be written."""
    if broken == "folder":
        (tmp_path / "stacks").write_text("a file where the folder should be")
    code = HANGING.replace("{last}", "stuck_here()")
    with subprocess.Popen(
        python("-c", code, tmp_path / "stacks"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        if broken == "pipe":
            process.stderr.close()
        assert process.wait(40) == 70
    assert (tmp_path / "stacks").is_dir() == (broken == "pipe")
    assert [end.outcome for end in read_ends(tmp_path)] == ["hung"]
    if broken == "pipe":
        assert "stuck_here" in (tmp_path / "stacks" / "rank-00003.txt").read_text()


def test_progress_keeps_it_quiet(tmp_path: Path) -> None:
    ended = run(tmp_path / "stacks", "pass")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not (tmp_path / "stacks").exists()
