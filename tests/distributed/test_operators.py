"""Operators are built in turn: who waits says so, and goes on when the builder is done or gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from dualtok.distributed import operators
from tests.support import ROOT, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

BUILDER = """
import sys, time
from types import SimpleNamespace
from dualtok.distributed import operators
def compile(builder):
    print("building", flush=True)
    time.sleep(float(sys.argv[1]))
operators._in_turn(compile)(SimpleNamespace(name="cpu_adam"))
print("built", flush=True)
"""
HOLDER = """
import os, sys, time
descriptor = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)  # as torch does
print("holding", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(operators, "NOTICE_AFTER_SECONDS", 0.2)
    return tmp_path


@contextmanager
def child(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process that has begun its work."""
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


@contextmanager
def waiter() -> Iterator[subprocess.Popen[str]]:
    """Start a process that wants to build the operator; it does not outlive the test."""
    with subprocess.Popen(
        [sys.executable, "-c", BUILDER, "0"],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def load(seconds: float = 0.0) -> None:
    operators._in_turn(lambda _: time.sleep(seconds))(SimpleNamespace(name="cpu_adam"))


def test_who_waits_says_for_whom_and_goes_on_when_it_is_built(capfd: pytest.CaptureFixture[str]) -> None:
    with child(BUILDER, "1.5") as process:
        load()
        assert process.stdout is not None
        assert process.stdout.readline() == "built\n"
    assert (
        f"dualtok: waiting for process {process.pid} to compile DeepSpeed's operator cpu_adam" in capfd.readouterr().err
    )


def test_a_builder_that_is_killed_is_not_waited_for() -> None:
    with child(BUILDER, "60") as process:
        os.kill(process.pid, signal.SIGSTOP)  # its time does not pass
        with waiter() as waiting:
            time.sleep(1.0)
            assert waiting.poll() is None
            process.kill()
            assert waiting.communicate(timeout=60)[0] == "building\nbuilt\n"


@pytest.mark.parametrize("place", ["cpu_adam", "py311_cpu/cpu_adam"])
def test_a_lock_of_torch_itself_is_waited_for_until_its_holder_dies(folder: Path, place: str) -> None:
    lock = folder / place / "lock"
    lock.parent.mkdir(parents=True)
    with child(HOLDER, str(lock)) as process, waiter() as waiting:
        assert waiting.stderr is not None
        told = waiting.stderr.readline()
        assert "waiting for another process to compile DeepSpeed's operator cpu_adam" in told
        process.kill()
        process.wait()
        shown, told = waiting.communicate(timeout=60)
    assert shown == "building\nbuilt\n"
    assert f"removed {lock}" in told
    assert not lock.exists()


def test_a_compilation_is_told_once_it_takes_longer_than_a_moment(capfd: pytest.CaptureFixture[str]) -> None:
    load()
    assert capfd.readouterr().err == ""
    load(0.5)
    assert "DeepSpeed compiles its operator cpu_adam for this host, once" in capfd.readouterr().err


def test_only_the_first_rank_of_a_host_speaks(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    load(0.5)
    assert capfd.readouterr().err == ""


def test_the_environments_ninja_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import shutil

    (tmp_path / "ninja").write_text("#!/bin/sh\necho another\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert shutil.which("ninja") == str(tmp_path / "ninja")
    operators.watch_operators()
    operators.watch_operators()
    from deepspeed.ops.op_builder.builder import OpBuilder

    assert shutil.which("ninja") == str(Path(sys.executable).with_name("ninja"))
    assert not hasattr(OpBuilder.jit_load.__wrapped__, "__wrapped__"), "wrapped twice"
