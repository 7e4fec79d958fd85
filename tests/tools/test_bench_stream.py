"""tools/bench_stream.py in miniature: every reader gives the same blocks, and each part says what it found.

Turns of a twentieth of a second say nothing about speed, so no figure of theirs is checked.
"""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support import ROOT, environment, python, succeed

if TYPE_CHECKING:
    from pathlib import Path

MOSAICML = ROOT / "build" / "mosaicml"
SMALL = ["--blocks", "1024", "--block-length", "64", "--seconds", "0.05", "--warm-up", "0.02", "--pairs", "1"]


def run_tool(folder: Path, *arguments: str) -> str:
    return succeed(
        subprocess.run(
            python("tools/bench_stream.py", "--folder", folder, *SMALL, *arguments),
            env=environment(PYTHONPATH=str(ROOT)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    )


def ratios(output: str) -> dict[str, float]:
    return {label: float(ratio) for label, ratio in re.findall(r"^(.+?): .* = ([\d.]+) \(median", output, re.MULTILINE)}


@pytest.mark.slow
def test_the_stream_is_compared_with_datasets_and_with_itself(tmp_path: Path) -> None:
    sizes = ["--seeks", "2", "--far-sample", "5000", "--batches", "50"]
    output = run_tool(tmp_path, "--readers", "datasets", "--parts", "readers", "seek", "memory", *sizes)
    assert "an epoch of 512 blocks is the same from dualtok and datasets" in output
    labels = ("dualtok / datasets", "first micro-batch at sample 5,000 / 10")
    assert ratios(output).keys() == {f"{workers} workers, {label}" for workers in (0, 2) for label in labels}
    growth = [float(ratio) for ratio in re.findall(r"last / second ([\d.]+)", output)]
    assert len(growth) == 2
    assert all(0.9 < ratio < 1.1 for ratio in growth)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.optional
@pytest.mark.skipif(
    not MOSAICML.is_dir(),
    reason=f"MosaicML's reader is not in {MOSAICML.relative_to(ROOT)}: pip install --no-deps --target build/mosaicml "
    "--requirement requirements-bench.txt",
)
def test_the_stream_is_compared_with_mosaicml(tmp_path: Path) -> None:
    output = run_tool(tmp_path, "--readers", "mosaicml", "--parts", "readers")
    assert "an epoch of 512 blocks is the same from dualtok and mosaicml" in output
    assert ratios(output).keys() == {f"{workers} workers, dualtok / mosaicml" for workers in (0, 2)}


def test_a_missing_reader_is_named_with_the_way_to_install_it(tmp_path: Path) -> None:
    result = subprocess.run(
        python("tools/bench_stream.py", *SMALL, "--parts", "readers", "--mosaicml", tmp_path),
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 1
    assert "--requirement requirements-bench.txt" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_stream_is_compared_with_the_demos_training(tmp_path: Path) -> None:
    output = run_tool(tmp_path, "--parts", "training")
    assert ratios(output)["demo, 2 workers, stream / training on one rank"] > 20
