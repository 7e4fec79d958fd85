"""Jobs that one of dualtok's own verbs starts on this host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support import ROOT, environment

JOB = """
import sys
from pathlib import Path

from dualtok.launch import local

long = "import os, time; print('train ' + str(os.getpid()), flush=True); time.sleep(600)"
local.torchrun = lambda *_: [sys.executable, "-c", long]
local.launch(["train", "run.yaml"], 1, Path(sys.argv[1]))
"""


def test_a_job_ends_with_the_verb_that_started_it(tmp_path: Path) -> None:
    """`kill` of a demo left its ranks running for hours."""
    log = tmp_path / "job.log"
    command = [sys.executable, "-c", JOB, str(log)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True, cwd=ROOT) as verb:
        assert verb.stdout is not None
        started = int(verb.stdout.readline().split()[-1])
        os.kill(started, 0)
        verb.send_signal(signal.SIGTERM)
        assert verb.wait(timeout=60) == 128 + signal.SIGTERM
    for _ in range(600):
        if not _runs(started):
            break
        time.sleep(0.1)
    assert not _runs(started), "the rank is still there"


def _runs(process: int) -> bool:
    """Whether a process is there and no zombie of a parent that has not looked yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
