"""Every DeepSpeed configuration of the repository starts a real engine, and README.md has a row for each."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT, command, environment

FILES = sorted((ROOT / "ds_configs").glob("*.json"))
NEED_AIO = ["1gpu_files"]
"""Files whose engine needs DeepSpeed's asynchronous I/O, hence Debian's libaio-dev; their rows say so."""


def test_the_readme_has_one_row_per_file() -> None:
    table = (ROOT / "ds_configs" / "README.md").read_text(encoding="utf-8")
    for name in NEED_AIO:
        assert "libaio-dev" in next(line for line in table.splitlines() if line.startswith(f"| `{name}.json`"))
    assert sorted(re.findall(r"^\| `(\S+\.json)`", table, re.MULTILINE)) == [file.name for file in FILES]


@pytest.mark.slow
def test_each_file_starts_an_engine_that_trains(tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    startable = [file for file in FILES if file.stem not in NEED_AIO or AsyncIOBuilder().is_compatible(verbose=False)]
    result = subprocess.run(
        command("tests.plan.start_ds_configs", tmp_path, *startable, ranks=2), env=environment(LOCAL_SIZE="2"),
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    found = json.loads((tmp_path / "losses.json").read_text())
    assert sorted(found) == [file.stem for file in startable]
    expected = found["zero0"][0]
    for name, (loss, stage) in found.items():
        assert loss == pytest.approx(expected, rel=0.01), name  # one model, one batch: only bf16 rounds
        assert stage == json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())["zero_optimization"]["stage"]
