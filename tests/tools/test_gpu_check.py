"""The check of a machine with a GPU, as far as it can be made without: small, by the same ways."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.support import ROOT, environment, python

if TYPE_CHECKING:
    from pathlib import Path


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        python("tools/gpu_check.py", *arguments),
        env=environment(CUDA_VISIBLE_DEVICES=""),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def rows(table: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return dict(line for line in lines if len(line) == 2)


@pytest.mark.slow
def test_its_table_holds_what_was_measured(tmp_path: Path) -> None:
    output = tmp_path / "table.md"
    wanted = ["machine", "head:liger", "step:plain", "step:dual"]
    done = check("--folder", str(tmp_path / "work"), "--output", str(output), "--only", *wanted)
    assert done.returncode == 0, done.stderr
    assert output.read_text() == done.stdout
    table, results = rows(done.stdout), json.loads((tmp_path / "work" / "results.json").read_text())
    steps = {name: results[f"step:{name}"] for name in ("plain", "dual")}
    assert all(figures["seconds"] > 0 and figures["tokens"] == 512 for figures in steps.values())
    for figures in steps.values():
        assert sum(figures["phases"].values()) == pytest.approx(figures["mean"], rel=0.03), "the run's own timer"
    ratio = steps["dual"]["seconds"] / steps["plain"]["seconds"]
    assert table["dual step with stored scores / dualtok's plain step"] == f"{ratio:.3f}"
    speed = steps["dual"]["tokens"] / steps["dual"]["seconds"]
    assert f"{speed:,.0f} tokens/s" in table["step: dual"]
    assert "cores" in table["device"]
    why = table["head:liger"]
    assert "needs a GPU" in why or "is not installed" in why, "a failed row says why; this one does not fail the check"


@pytest.mark.slow
def test_ways_of_training_are_compared_with_host_cores(tmp_path: Path) -> None:
    ways = ["resumed halfway", "pipeline"]
    done = check("--folder", str(tmp_path), "--only", "parity", "command:dp_sgd", "--ways", *ways)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    unlike = results["parity"]["unlike"]
    assert set(unlike) == {"host cores", *ways}
    table = rows(done.stdout)
    assert table["parity: pipeline"] == "{loss:.1e}, {gradient_norm:.1e}".format_map(unlike["pipeline"])
    assert table["command: dp_sgd"].startswith("loss 8.")


PROGRAM = """
import sys; sys.path.insert(0, 'tools')
from gpu import commands, table
figures = {'unlike': {'device': {'loss': 1e-6, 'gradient_norm': 2e-5}, 'bf16': {'loss': 1e-3, 'gradient_norm': 2e-3},
                      'pipeline': {'loss': float('nan'), 'gradient_norm': 0.0}},
           'failed': {'stored scores': 'no such file'}, 'left_out': ['sharded pipeline'], 'steps': 8}
print(table.markdown({'parity': figures}))
on_gpu = commands.allowed_of('device', on_gpu=True)
print('| norms on a GPU |', on_gpu['gradient_norm'] / on_gpu['loss'], '|')
"""


def test_a_way_that_trains_another_model_is_a_fault() -> None:
    shown = subprocess.run(
        python("-c", PROGRAM),
        env=environment(CUDA_VISIBLE_DEVICES=""),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    table = rows(shown)
    assert table["parity: device"] == "1.0e-06, 2.0e-05, more than 1e-05, 1e-05: FAULT"
    assert table["parity: bf16"] == "1.0e-03, 2.0e-03"
    assert table["parity: pipeline"] == "nan, 0.0e+00, more than 1e-05, 1e-05: FAULT"
    assert table["parity: stored scores"] == "failed: no such file"
    assert float(table["norms on a GPU"]) == pytest.approx(20), "host cores add up less exactly"
    assert table["parity: sharded pipeline"] == "left out, for it needs two devices"


TOO_LONG = """
import sys; sys.path.insert(0, 'tools')
from argparse import Namespace
from pathlib import Path
from gpu_check import in_a_fresh_process
print(in_a_fresh_process('command:doctor', Namespace(folder=Path(sys.argv[1]), ways=None, deadline=15)))
"""


@pytest.mark.slow
def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """The doctor takes longer; its processes work in the folder."""
    shown = subprocess.run(
        [sys.executable, "-c", TOO_LONG, str(tmp_path)],
        env=environment(),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        timeout=120,
        check=True,
    ).stdout
    assert shown == "{'error': 'not done after 15 s'}\n"
    left = [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(tmp_path)]
    assert left == []


REFUSED = """
import sys; sys.path.insert(0, 'tools')
from contextlib import suppress
from gpu_check import main
for arguments in ('--only step:dula', '--only parity --ways fp4', '--only machine --ways bf16'):
    sys.argv[1:] = ['--folder', '/nowhere', *arguments.split()]
    with suppress(SystemExit):
        main()
"""


def test_what_it_does_not_measure_is_named() -> None:
    shown = subprocess.run(
        python("-c", REFUSED), env=environment(), cwd=ROOT, text=True, capture_output=True, timeout=120, check=True
    ).stderr
    errors = [line.partition(": error: ")[2] for line in shown.splitlines() if ": error: " in line]
    starts = [
        "--only: no measurement 'step:dula'; there are machine, parity, command, head, step, ",
        "--ways: no way 'fp4'; there are host cores, device, bf16, ",
        "--ways: has no effect without --only parity",
    ]
    assert len(errors) == 3, shown
    assert all(error.startswith(start) for error, start in zip(errors, starts, strict=True)), errors
