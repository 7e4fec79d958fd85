"""Ranks that find wrong gradients and sums, and ranks that never answer."""

from __future__ import annotations

import os
import sys
import time

import psutil
import pytest

from dualtok.doctor.rank_job import RankJob, results_of, run_ranks
from tests import warm


@pytest.fixture(autouse=True)
def _ranks_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))  # noqa: PTH120


def spoiled(what: str, seconds: float = 180) -> RankJob:
    return RankJob("tests.doctor.spoiled", (what,), processes=2, seconds=seconds)


@pytest.mark.slow
def test_sums_that_are_wrong_and_gradients_that_are_divided_twice_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", warm.launcher()[0])
    collectives, gradients, kernels = results_of([run_ranks(spoiled("wrong"))])
    assert collectives.status == "fail"
    assert "sums or gathered values are wrong" in collectives.found
    assert gradients.status == "fail"
    assert "ZeRO-1 7.5e-01, ZeRO-3 7.5e-01" in gradients.found, "a quarter of what they should be"
    assert "install deepspeed==0.19.8" in gradients.remedy
    assert kernels.status == "ok"


@pytest.mark.slow
def test_a_slow_link_is_told_and_ranks_that_wait_for_each_other_are_ended_at_the_deadline() -> None:
    started = time.monotonic()
    ended = run_ranks(spoiled("hang", seconds=45))
    assert time.monotonic() - started < 75
    collectives, gradients, kernels = results_of([ended])
    assert collectives.status == "warn", ended.output[-2000:]
    assert "bus bandwidth of all-reduce" in collectives.found
    assert "GLOO_SOCKET_IFNAME" in collectives.remedy
    assert (gradients.status, gradients.found) == ("fail", "no answer while gradients")
    assert kernels.status == "not-run"
    mine = [process for process in psutil.process_iter() if "tests.doctor.spoiled" in " ".join(_command(process))]
    assert mine == [], "no process is left"


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
