"""Every DeepSpeed configuration of the repository starts a real engine, and README.md has a row for each."""

from __future__ import annotations

import json
import re
import subprocess

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


@pytest.fixture(scope="module")
def has_aio() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


@pytest.fixture(scope="module")
def started(has_aio: bool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, int]]:
    """Return loss and ZeRO stage of each file's engine, but of those that cannot start here."""
    folder = tmp_path_factory.mktemp("engines")
    startable = [file for file in FILES if has_aio or file.stem not in NEED_AIO]
    result = subprocess.run(
        command("tests.plan.start_ds_configs", folder, *startable, ranks=2),
        env=environment(LOCAL_SIZE="2"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    found: dict[str, tuple[float, int]] = json.loads((folder / "losses.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        # Its operator takes minutes to compile, so that no machine is asked to have what it needs.
        pytest.param(file.stem, marks=[pytest.mark.optional] if file.stem in NEED_AIO else [])
        for file in FILES
    ],
)
def test_a_file_starts_an_engine_that_trains(name: str, started: dict[str, tuple[float, int]], has_aio: bool) -> None:
    if name in NEED_AIO and not has_aio:
        pytest.skip("not installed: libaio-dev, for DeepSpeed's asynchronous I/O")
    loss, stage = started[name]
    assert loss == pytest.approx(started["zero0"][0], rel=0.01)  # one model, one batch: only bf16 rounds
    assert stage == json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())["zero_optimization"]["stage"]
