"""Plain lines where there is no terminal, a bar where there is one, silence on the other ranks."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from typing import TYPE_CHECKING

from dualtok.monitor.progress import RunProgress
from tests.support import ROOT

if TYPE_CHECKING:
    import pytest

SCRIPT = """
from dualtok.monitor.progress import RunProgress
with RunProgress("train", 4, plain_every=2) as progress:
    for _ in range(4):
        progress.advance(1, "loss 1.5 100 tokens/s")
    progress.note("step 4: evaluated")
"""


def test_plain_lines_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with RunProgress("train", 5, plain_every=2) as progress:
        for _ in range(5):
            progress.advance(1, "loss 2.0")
        progress.note("done")
    lines = capfd.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["2/5", "4/5", "5/5"]
    assert all("loss 2.0" in line and line.endswith("left") for line in lines[:-1])
    assert lines[-1] == "done"


def test_other_ranks_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with RunProgress("train", 2, active=False) as progress:
        progress.advance(2, "loss")
        progress.note("done")
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""


def test_a_bar_on_a_terminal() -> None:
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stderr=child,
        stdout=child,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(child)
    shown = b""
    try:
        while chunk := os.read(parent, 4096):
            shown += chunk
    except OSError:  # the terminal's other end is closed
        pass
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "4/4" in text
    assert "100 tokens/s" in text
    assert "━" in text, "no bar was drawn"
    assert "step 4: evaluated" in text
