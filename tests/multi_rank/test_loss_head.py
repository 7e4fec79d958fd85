"""The loss head inside DeepSpeed's engines on two ranks, against plain torch in one process."""

from __future__ import annotations

import subprocess

import pytest

from tests.support import ROOT, command, environment


@pytest.mark.slow
def test_two_ranks_of_zero_train_as_the_formula_says() -> None:
    """Tied and untied, whatever the number of chunks on each rank, accumulated, for both global scopes."""
    from tests.multi_rank.loss_head_worker import CASES

    result = subprocess.run(
        command("tests.multi_rank.loss_head_worker", ranks=2),
        env=environment(LOCAL_SIZE="2"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.removeprefix("CASE ").split(" | ") for line in result.stdout.splitlines() if line.startswith("CASE ")]
    errors = {name: float(error) for name, error in lines}
    assert errors.keys() == {*CASES, "dropout, scope step"}
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}
