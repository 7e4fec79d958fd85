"""Do the tests see small faults? Seed them one by one in a copy of the tree and run the tests that should fail.

    python tools/mutation_check.py                        # all faults of tools/mutations
    python tools/mutation_check.py --only s-sign tau-included
    python tools/mutation_check.py --tests-from ../older  # the tests of another checkout against the same faults

The named tests must pass in the unchanged copy first. Exit status: 0 when every fault is caught or stated to survive,
1 when one survives without a reason, 2 when the tool cannot judge: the tests fail without a fault, or did not run.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutations import FAULTS, Fault

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "dualtok",
    "tests",
    "tools",
    "ds_configs",
    "launch",
    "docs",
    "README.md",
    "Makefile",
    "pyproject.toml",
    "constraints.txt",
)
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".hypothesis")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
"""A line of pytest's summary."""
PASSED = re.compile(r"\b\d+ passed\b")
Outcome = Literal["caught", "survived", "error"]


@dataclass(frozen=True)
class Ended:
    """How a run of tests ended."""

    status: int | None
    """Exit status; None after a time-out."""
    output: str


@dataclass(frozen=True)
class Result:
    """What the tests said to one fault."""

    name: str
    what: str
    outcome: Outcome
    by: str
    """The first test that failed, ``time-out``, or what went wrong."""
    seconds: float
    reason: str = ""
    """Why it may survive."""

    @property
    def is_open(self) -> bool:
        """Whether it survived and nobody says why."""
        return self.outcome == "survived" and not self.reason


class ToolError(Exception):
    """The tests cannot be judged."""


def copy_tree(root: Path, copy: Path, tests_from: Path | None) -> None:
    """Copy what the tests need; ``tests_from`` is another checkout, or its folder of tests."""
    for path in [*(root / name for name in COPIED), *root.glob("requirements-*.txt")]:
        if path.is_dir():
            shutil.copytree(path, copy / path.name, ignore=LEFT_OUT)
        elif path.is_file():
            shutil.copy2(path, copy / path.name)
    if tests_from is not None:
        inner = tests_from / "tests"
        shutil.rmtree(copy / "tests")
        shutil.copytree(inner if inner.is_dir() else tests_from, copy / "tests", ignore=LEFT_OUT)


def environment(copy: Path, root: Path) -> dict[str, str]:
    """Return the variables under which Python takes the package from the copy and nothing compiled from before."""
    return {
        **os.environ,
        "PYTHONPATH": str(copy),
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(root / ".torch_extensions")),
        # A compiled file is found by its source's second and size, which a fault may leave as they were.
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run_tests(copy: Path, root: Path, tests: Sequence[str], seconds: float, *, first: bool = True) -> Ended:
    """Run tests in a copy; with ``first`` until one fails. After a time-out all their processes are killed."""
    command = [sys.executable, "-m", "pytest", *(["-x"] if first else []), "-q", "-p", "no:cacheprovider", *tests]
    with tempfile.TemporaryFile() as stream:
        process = subprocess.Popen(
            command,
            cwd=copy,
            env=environment(copy, root),
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # Also what a test that failed has left behind.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stream.seek(0)
        return Ended(status, stream.read().decode("utf-8", errors="replace"))


def require_own_package(copy: Path, root: Path) -> None:
    """Make sure that the package which is tested is the copy's.

    Raises:
        ToolError: it is another one, in which no fault would be seen.
    """
    code = "import dualtok; print(dualtok.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=environment(copy, root), text=True, capture_output=True, check=False
    )
    if Path(found.stdout.strip() or ".").resolve().parent != (copy / "dualtok").resolve():
        raise ToolError(f"the package is imported from {found.stdout.strip() or found.stderr}, not from the copy")


def tests_there(copy: Path, tests: Sequence[str]) -> list[str]:
    """Return the tests that the copy has; for a function that it lacks its whole file, if there is one."""
    found = []
    for test in tests:
        file, _, function = test.partition("::")
        path = copy / file
        if path.exists():
            has = not function or re.search(rf"^def {function.partition('[')[0]}\(", path.read_text(), re.MULTILINE)
            found.append(test if has else file)
    return list(dict.fromkeys(found))


def mutated(text: str, fault: Fault) -> str:
    """Return a file's text with the fault.

    Raises:
        ToolError: the text to replace is not there exactly once.
    """
    if (count := text.count(fault.old)) != 1:
        raise ToolError(f"{fault.name}: {fault.file} has {fault.old!r} {count} times, not once")
    return text.replace(fault.old, fault.new)


def judge(fault: Fault, copy: Path, root: Path, seconds: float) -> Result:
    """Seed a fault in a copy, run its tests, and fix the file."""
    started = time.monotonic()

    def result(outcome: Outcome, by: str) -> Result:
        return Result(fault.name, fault.what, outcome, by, round(time.monotonic() - started, 1), fault.survives)

    path = copy / fault.file
    sound = path.read_text(encoding="utf-8")
    tests = tests_there(copy, fault.tests)
    if not tests:
        return result("survived", "no such test")
    try:
        path.write_text(mutated(sound, fault), encoding="utf-8")
        ended = run_tests(copy, root, tests, seconds)
    except ToolError as error:
        return result("error", str(error))
    finally:
        path.write_text(sound, encoding="utf-8")
    if ended.status is None:
        return result("caught", "time-out")
    if ended.status == 1:
        return result("caught", next(iter(FAILED.findall(ended.output)), "a test"))
    if ended.status == 0 and PASSED.search(ended.output):
        return result("survived", "")
    last = ended.output.strip().splitlines()[-1:] or [""]
    return result("error", f"pytest ended with status {ended.status}: {last[0]}")


def require_sound(copy: Path, root: Path, faults: Sequence[Fault], seconds: float) -> None:
    """Run all named tests once without a fault.

    Raises:
        ToolError: one fails.
    """
    require_own_package(copy, root)
    # A whole file takes its functions with it.
    named = list(dict.fromkeys(test for fault in faults for test in tests_there(copy, fault.tests)))
    tests = [test for test in named if "::" not in test or test.partition("::")[0] not in named]
    if not tests:
        raise ToolError("none of the named tests exists")
    ended = run_tests(copy, root, tests, seconds, first=False)
    if ended.status != 0:
        tail = "\n".join(ended.output.splitlines()[-40:])
        how = "time-out" if ended.status is None else f"status {ended.status}"
        raise ToolError(f"the tests do not pass without a fault ({how}):\n{tail}")


def check(
    root: Path, faults: Sequence[Fault], *, tests_from: Path | None = None, jobs: int = 1, seconds: float = 600.0
) -> list[Result]:
    """Return what the tests say to each fault, in their order.

    Args:
        root: the tree, which is left alone.
        faults: what to seed.
        tests_from: another checkout whose tests are run.
        jobs: faults at a time, each in a copy of its own.
        seconds: after which the tests of one fault count as failed.

    Raises:
        ToolError: the tests do not pass without a fault.
    """
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(jobs):
            copy = Path(folder) / str(number)
            copy.mkdir()
            copy_tree(root, copy, tests_from)
            copies.put(copy)
        require_sound(Path(folder) / "0", root, faults, seconds * max(1, len(faults)))

        def one(fault: Fault) -> Result:
            copy = copies.get()
            try:
                found = judge(fault, copy, root, seconds)
            finally:
                copies.put(copy)
            print(f"{found.outcome:8} {found.seconds:6.1f} s  {found.name}: {found.by or found.what}", flush=True)
            return found

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, faults))


def summary(results: Sequence[Result]) -> str:
    """Return the table of all faults, and the line that counts them."""
    lines = ["| fault | what it does | outcome | by |", "|---|---|---|---|"]
    for found in results:
        by = found.by or found.reason
        lines.append(f"| {found.name} | {found.what} | {found.outcome} | {by.replace('|', '/')} |")
    needless = [found.name for found in results if found.outcome == "caught" and found.reason]
    errors = [found.name for found in results if found.outcome == "error"]
    survivors = [
        f"{found.name} (accepted)" if found.reason else found.name for found in results if found.outcome == "survived"
    ]
    caught = sum(found.outcome == "caught" for found in results)
    if needless:
        lines += ["", f"caught although stated to survive: {', '.join(needless)}"]
    if errors:
        lines += ["", f"not judged: {', '.join(errors)}"]
    return "\n".join([*lines, "", f"caught {caught} of {len(results)}, survivors: {', '.join(survivors) or 'none'}"])


def exit_status(results: Sequence[Result]) -> int:
    """Return 2 if a fault could not be judged, 1 if one survived without a reason, else 0."""
    if any(found.outcome == "error" for found in results):
        return 2
    return int(any(found.is_open for found in results))


def chosen(faults: Sequence[Fault], names: Sequence[str] | None) -> list[Fault]:
    """Return the faults of these names, or all.

    Raises:
        SystemExit: there is no fault of a name.
    """
    if names is None:
        return list(faults)
    known = {fault.name: fault for fault in faults}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no such fault: {', '.join(unknown)}; see --list")
    return [known[name] for name in names]


def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT, faults: Sequence[Fault] = FAULTS) -> int:
    """Seed the faults, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults to seed; default: all")
    parser.add_argument("--list", action="store_true", help="print the faults and their tests, and end")
    parser.add_argument("--tests-from", type=Path, metavar="DIR", help="another checkout whose tests are run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for the tests of one fault")
    options = parser.parse_args(arguments)
    wanted = chosen(faults, options.only)
    if options.list:
        for fault in wanted:
            print(f"{fault.name}: {fault.what} ({fault.file}; {' '.join(fault.tests)})")
        return 0
    try:
        results = check(root, wanted, tests_from=options.tests_from, jobs=options.jobs, seconds=options.timeout)
    except ToolError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{summary(results)}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(found) for found in results], indent=1) + "\n", encoding="utf-8")
    return exit_status(results)


if __name__ == "__main__":
    # Ended by a signal, it waits for the tests of the fault that is seeded, and removes its copies.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
