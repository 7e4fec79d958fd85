"""What tests cost is charged to the test that spent it, whichever process did the work; two runs can be compared."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import ROOT, environment

if TYPE_CHECKING:
    from pathlib import Path

CASES = """
import subprocess, sys, time

BURN = "import time\\nwhile time.process_time() < 0.6: pass"

def test_works_itself():
    until = time.process_time() + 0.6
    while time.process_time() < until: pass

def test_lets_an_ended_child_work():
    subprocess.run([sys.executable, "-I", "-S", "-c", BURN], check=True)

def test_lets_a_living_child_work():
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", BURN + "\\nprint(flush=True)\\ntime.sleep(9)"],
                             stdout=subprocess.PIPE)
    child.stdout.readline()

def test_waits():
    time.sleep(0.6)
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_seconds_are_those_of_the_test_that_spent_them(tmp_path: Path, workers: list[str]) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "test_cases.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    file = tmp_path / "times.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "tests.times",
            "--times",
            str(file),
            "-p",
            "no:cacheprovider",
            *workers,
            str(tmp_path),
        ],
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())
    tests = {name.rpartition("::")[2]: test for name, test in figures["tests"].items()}
    for name in ("test_works_itself", "test_lets_an_ended_child_work", "test_lets_a_living_child_work"):
        assert tests[name]["cpu"] >= 0.55, tests
    assert tests["test_waits"]["cpu"] < 0.5, tests
    assert all(test["wall"] >= 0.55 for test in tests.values()), tests
    assert figures["wall"] > 2
    assert figures["memory_gib"] >= 0
    [folder] = [line.split() for line in done.stdout.splitlines() if line.endswith("  inner")]
    assert folder[2] == "4"
    assert float(folder[1]) == pytest.approx(sum(test["cpu"] for test in tests.values()), abs=0.1)
    slowest = done.stdout.partition("slowest tests")[2].partition("folders, seconds")[0]
    assert "test_cases.py::test_waits" in slowest


def written(path: Path, wall: float, **tests: tuple[float, float]) -> Path:
    named: dict[str, Any] = {
        f"tests/{name.replace('__', '/')}.py::test_x": {"wall": spent[0], "cpu": spent[1]}
        for name, spent in tests.items()
    }
    path.write_text(json.dumps({"wall": wall, "memory_gib": 2.0, "tests": named}))
    return path


def compare(*files: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/compare_test_times.py", *map(str, files)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    before = written(tmp_path / "before.json", 100.0, a__test_1=(10.0, 8.0), a__test_2=(5.0, 4.0), b__test_3=(2.0, 0.0))
    after = written(tmp_path / "after.json", 25.0, a__test_1=(4.0, 2.0), a__test_2=(5.0, 4.0), c__test_4=(1.0, 1.0))
    lines = compare(before, after).stdout.splitlines()
    assert "| tests/a | 15.0 | 9.0 | 12.0 | 6.0 | 0.50 |" in lines
    assert "| tests/b | 2.0 | 0.0 | 0.0 | 0.0 | n/a |" in lines
    assert "| all, by the clock | 100.0 | 25.0 | 12.0 | 7.0 | 0.58 |" in lines
    assert "Tests: 3 and 3. By the clock 0.250 of before. Memory at most 2.0 and 2.0 GiB." in lines
    assert lines.index("| `tests/a/test_1.py::test_x` | 10.0 | 4.0 | 8.0 | 2.0 | 0.25 |") < lines.index(
        "| `tests/a/test_2.py::test_x` | 5.0 | 5.0 | 4.0 | 4.0 | 1.00 |"
    )
    assert "Only before: `tests/b/test_3.py::test_x`" in lines
    assert "Only after: `tests/c/test_4.py::test_x`" in lines


@pytest.mark.parametrize("text", ["{", "[]", '{"wall": 1}'])
def test_a_file_without_figures_is_named(tmp_path: Path, text: str) -> None:
    good, bad = written(tmp_path / "good.json", 1.0), tmp_path / "bad.json"
    bad.write_text(text)
    done = compare(good, bad)
    assert done.returncode == 1
    assert f"{bad}: " in done.stderr
    assert "--times FILE" in done.stderr
