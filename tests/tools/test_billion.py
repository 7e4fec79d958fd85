"""tools/billion.py on a tiny model: real ranks, ZeRO-3 with everything in host memory, an offloaded reference."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support import ROOT, environment, python

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
def test_a_tiny_model_takes_dual_steps_and_the_plan_stands_beside_what_was_measured(tmp_path: Path) -> None:
    result = subprocess.run(
        python(
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "tools/billion.py",
            "--size",
            "tiny",
            "--states",
            "cpu",
            "--folder",
            tmp_path,
        ),
        env=environment(LOCAL_SIZE="2"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    steps = re.findall(r"step (\d): loss (\S+), hard (\S+), memorized (\S+), gradient norm (\S+),", result.stdout)
    assert [step for step, *_ in steps] == ["1", "2"]
    for _, loss, hard, memorized, norm in steps:
        assert float(norm) > 0
        # Random weights know nothing: both sets lie near log(32,000) = 10.4, and the loss is their weighted difference.
        assert float(loss) == pytest.approx(float(hard) - 0.8 * float(memorized), abs=1e-3)
        assert 8 < float(memorized) < float(hard) < 13
    assert "0.004 billion parameters, 2 ranks" in result.stdout
    planned = re.search(r"planned (\S+): measured / planned", result.stdout)
    assert planned is not None
    assert 0 < float(planned[1]) < 1
    assert result.stdout.count("proportional set size now") == 2
    assert not (tmp_path / "tiny" / "states").exists()
