"""What a run of the tests cost: seconds of wall and of processors for each test and each folder, and memory.

``make test`` prints the slowest tests and the folders; with ``--times FILE`` all figures are kept as JSON, and
``tools/compare_test_times.py`` sets two such files side by side.

Processor seconds are user and system time of the test process and of all that it has started, forks of a server
(:mod:`tests.warm`) included, those of a shared one when they end. What is missing: processes still alive when their
starter ends and that nobody waits for, and a shared server itself. A fixture's cost belongs to the test that first asks
for it.
"""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import warm

if TYPE_CHECKING:
    from collections.abc import Generator

SLOWEST = 25
CPU = "processor_seconds"
_TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds() -> float:
    """Return user and system seconds of this process, of its ended children, its living descendants and its forks."""
    own = sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )
    return own + warm.seconds_of_forks() + sum(map(_alive_seconds, _children(os.getpid())))


def _children(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except OSError:  # the thread has just ended
            continue
    return found


def _alive_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended, and was counted among the ended ones
        return 0.0
    times = fields[11:15]  # utime stime cutime cstime
    return sum(map(int, times)) / _TICKS + sum(map(_alive_seconds, _children(process)))


def memory_in_use() -> float:
    """Return GiB of this machine's memory that are not available."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return (total - free) / 2**20


class Meter:
    """Measures in the process that runs tests, and adds what it found to each report."""

    def __init__(self) -> None:
        self._before = processor_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Add the processor seconds since the report before."""
        report = yield
        now = processor_seconds()
        report.user_properties = [*report.user_properties, (CPU, now - self._before)]
        self._before = now
        return report


class Summary:
    """Collects the reports of all test processes, and prints and keeps the sums."""

    def __init__(self, file: str | None) -> None:
        self._file = file
        self._started = time.monotonic()
        self._wall: Counter[str] = Counter()
        self._cpu: Counter[str] = Counter()
        self._memory_before = self._memory_peak = memory_in_use()
        self._ended = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self._ended.wait(1.0):
            self._memory_peak = max(self._memory_peak, memory_in_use())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add one phase of one test."""
        self._wall[report.nodeid] += report.duration
        self._cpu[report.nodeid] += dict(report.user_properties).get(CPU, 0.0)  # type: ignore[arg-type]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the slowest tests and the folders, and write the file."""
        self._ended.set()
        tests = {name: {"wall": self._wall[name], "cpu": self._cpu[name]} for name in sorted(self._wall)}
        figures = {
            "wall": time.monotonic() - self._started,
            "memory_gib": self._memory_peak - self._memory_before,
            "tests": tests,
        }
        write = terminalreporter.write_line
        terminalreporter.section(f"{SLOWEST} slowest tests, seconds", sep="=")
        write("    wall     cpu  test")
        for name in sorted(tests, key=lambda name: -tests[name]["wall"])[:SLOWEST]:
            write(f"{tests[name]['wall']:8.1f}{tests[name]['cpu']:8.1f}  {name}")
        terminalreporter.section("folders, seconds (cpu: user and system of all processes)", sep="=")
        write("    wall     cpu   tests  folder")
        for folder, (wall, cpu, count) in sorted(by_folder(tests).items(), key=lambda row: -row[1][0]):
            write(f"{wall:8.1f}{cpu:8.1f}{count:8}  {folder}")
        write(
            f"{figures['wall']:.0f} s by the clock; at most {figures['memory_gib']:.1f} GiB of memory more than before"
        )
        if self._file:
            Path(self._file).write_text(json.dumps(figures, indent=1), encoding="utf-8")


def by_folder(tests: dict[str, dict[str, float]]) -> dict[str, tuple[float, float, int]]:
    """Return wall seconds, processor seconds and number of tests of each folder of tests."""
    sums: dict[str, tuple[float, float, int]] = {}
    for name, test in tests.items():
        folder = str(Path(name.partition("::")[0]).parent)
        wall, cpu, count = sums.get(folder, (0.0, 0.0, 0))
        sums[folder] = (wall + test["wall"], cpu + test["cpu"], count + 1)
    return sums


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--times``."""
    parser.addoption("--times", metavar="FILE", help="print what tests cost, and keep all figures in FILE as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Measure where tests run, and collect where they are reported."""
    file = config.getoption("--times")
    if not file:
        return
    worker = hasattr(config, "workerinput")
    if worker or not config.getoption("numprocesses", None):
        config.pluginmanager.register(Meter(), "test-times-meter")
    if not worker:
        config.pluginmanager.register(Summary(file), "test-times-summary")
