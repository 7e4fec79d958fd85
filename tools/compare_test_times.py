"""Set two runs of the tests side by side: seconds of each folder and of the tests that changed most.

    make test && cp .test-times.json before.json     # at one commit
    make test && python tools/compare_test_times.py before.json .test-times.json

Processor seconds are user and system time of all processes; they depend less on what else the machine does than seconds
by the clock, which tests that run at the same time also share.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.times import by_folder


def read(path: Path) -> dict[str, Any]:
    """Return the figures of a run.

    Raises:
        SystemExit: the file is missing or is not what ``--times`` writes.
    """
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        if {"wall", "memory_gib", "tests"} <= figures.keys():
            return figures
    except (OSError, ValueError, AttributeError) as error:
        raise SystemExit(f"{path}: {error}; give a file that `pytest -p tests.times --times FILE` wrote") from None
    raise SystemExit(f"{path}: holds no figures of tests; give a file that `pytest -p tests.times --times FILE` wrote")


def row(name: str, before: tuple[float, float], after: tuple[float, float]) -> str:
    """Return a line of a table: wall and processor seconds before and after, and the ratio of the latter."""
    ratio = f"{after[1] / before[1]:.2f}" if before[1] else "n/a"
    return f"| {name} | {before[0]:.1f} | {after[0]:.1f} | {before[1]:.1f} | {after[1]:.1f} | {ratio} |"


def compare(before: dict[str, Any], after: dict[str, Any], most: int) -> str:
    """Return the tables as Markdown."""
    lines = ["| folder | wall before, s | after | processors before, s | after | ratio |", "|---|---|---|---|---|---|"]
    folders = [by_folder(run["tests"]) for run in (before, after)]
    none = (0.0, 0.0, 0)
    for name in sorted(folders[0].keys() | folders[1].keys()):
        old, new = (found.get(name, none) for found in folders)
        lines.append(row(name, old[:2], new[:2]))
    sums = [sum(folder[1] for folder in found.values()) for found in folders]
    lines.append(row("all, by the clock", (before["wall"], sums[0]), (after["wall"], sums[1])))
    counts = [len(run["tests"]) for run in (before, after)]
    lines += [
        "",
        f"Tests: {counts[0]} and {counts[1]}. By the clock {after['wall'] / before['wall']:.3f} of before. "
        f"Memory at most {before['memory_gib']:.1f} and {after['memory_gib']:.1f} GiB.",
        "",
    ]
    lines += ["| test | wall before, s | after | processors before, s | after | ratio |", "|---|---|---|---|---|---|"]
    tests = [{name: (test["wall"], test["cpu"]) for name, test in run["tests"].items()} for run in (before, after)]
    both = tests[0].keys() & tests[1].keys()
    for name in sorted(both, key=lambda name: -abs(tests[0][name][1] - tests[1][name][1]))[:most]:
        lines.append(row(f"`{name}`", tests[0][name], tests[1][name]))
    for title, names in (("Only before", tests[0].keys() - both), ("Only after", tests[1].keys() - both)):
        if names:
            lines += ["", f"{title}: {', '.join(f'`{name}`' for name in sorted(names))}"]
    return "\n".join(lines)


def main() -> None:
    """Print the comparison of two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--most", type=int, default=25, help="tests to show, those that changed most")
    options = parser.parse_args()
    print(compare(read(options.before), read(options.after), options.most))


if __name__ == "__main__":
    main()
