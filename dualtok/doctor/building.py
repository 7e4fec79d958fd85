"""DeepSpeed's compiled operators: the compiler, locks that killed compilations left, and the operators themselves.

    python -m dualtok.doctor.building [ShareMemCommBuilder] [CPUAdamBuilder]

builds operators ahead of the first run, which would otherwise compile them with all ranks waiting.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dualtok.distributed.deepspeed_config import offloads_optimizer, read_deepspeed_json
from dualtok.distributed.operators import is_shared, operators_folder, stale_locks
from dualtok.doctor.result import CheckResult, Subject, judged
from dualtok.errors import ConfigError

# Imported where they are used, for what they take to load: DeepSpeed (2 s).

BUILD_SECONDS = 420
PROGRAM = "#include <vector>\nint main() { return static_cast<int>(std::vector<int>(3).size()) - 3; }\n"


def check_compiler() -> CheckResult:
    """Compile and start a small C++ program; look for ninja, and whether it is this environment's."""
    name = "compiler"
    compiler = os.environ.get("CXX", "c++")
    remedy = "apt-get install g++ (or set CXX), and pip install ninja with its folder in PATH"
    ninja, own = shutil.which("ninja"), Path(sys.executable).with_name("ninja")
    if ninja is None:
        return CheckResult(name, "fail", "ninja is not in PATH, without which torch compiles nothing", remedy)
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "small.cpp", Path(folder) / "small"
        source.write_text(PROGRAM)
        try:
            subprocess.run(
                [compiler, "-std=c++17", str(source), "-o", str(program)],
                check=True,
                capture_output=True,
                text=True,
                timeout=120,
            )
            subprocess.run([str(program)], check=True, timeout=60)
            words = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            return CheckResult(name, "fail", f"there is no {compiler}", remedy)
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
            return CheckResult(name, "fail", f"{compiler} makes no working program: {''.join(said)[:200]}", remedy)
    other = [f"{ninja} comes before {own} in PATH"] if own.is_file() and not own.samefile(ninja) else []
    remedy = f"put {own.parent} first in PATH: each version of ninja compiles all operators of the others again"
    return judged(name, other, f"{words.stdout.splitlines()[0]}, {ninja}", remedy, bad="warn")


def check_locks(folder: Path | None = None) -> CheckResult:
    """Look for locks of compilations that no process of this host holds: every start would wait for them for ever."""
    name = "JIT locks"
    folder = folder or operators_folder()
    stale = stale_locks(folder)
    if stale:
        return CheckResult(
            name,
            "fail",
            f"left by a killed compilation: {', '.join(map(str, stale))}",
            f"rm {' '.join(map(str, stale))}, if no host compiles there now",
        )
    if is_shared(folder):
        found = f"{folder} lies on a file system that hosts share: they wait for each other's compilations"
        return CheckResult(name, "warn", found, "set TORCH_EXTENSIONS_DIR to a disk of each host")
    return CheckResult(name, "ok", f"none in {folder}")


def operators_needed(subject: Subject) -> list[str]:
    """Return the builders of the operators that jobs on this host use."""
    from deepspeed.accelerator import get_accelerator

    needed = ["ShareMemCommBuilder"] if get_accelerator().device_name() == "cpu" else []
    train = None if subject.run is None else subject.run.train
    try:
        if (
            train is not None
            and train.deepspeed is not None
            and offloads_optimizer(read_deepspeed_json(train.deepspeed))
        ):
            needed.append("CPUAdamBuilder")
    except ConfigError:  # said by the check of the run
        pass
    return needed


def check_operators(names: list[str], *, quick: bool = False, locks: CheckResult | None = None) -> CheckResult:
    """Build or load the operators in a process of their own, with a deadline; ``quick`` only looks whether they are
    there.

    Args:
        names: DeepSpeed's builders.
        quick: compile nothing.
        locks: what :func:`check_locks` found; behind a stale lock nothing could be built.
    """
    name = "operators"
    build = f"{sys.executable} -m dualtok.doctor.building {' '.join(names)}"
    if not names:
        return CheckResult(name, "ok", "none needed: the job runs on accelerators and offloads no optimizer")
    if locks is not None and locks.status == "fail":
        return CheckResult(name, "not-run", "would wait for the stale lock")
    if quick:
        missing = [builder for builder in names if not _is_built(builder)]
        problem = [f"not built yet: {', '.join(missing)}; the first job compiles them"] if missing else []
        return judged(name, problem, f"{', '.join(names)}: built", build, bad="warn")
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        command = [sys.executable, "-m", "dualtok.doctor.building", *names]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = process.wait(BUILD_SECONDS)
        except subprocess.TimeoutExpired:  # to end it would leave a stale lock behind
            found = f"not built after {BUILD_SECONDS} s; process {process.pid} goes on"
            return CheckResult(name, "fail", found, "look what it does, or wait for it; then start the doctor again")
        output.seek(0)
        said = [line for line in output if line.strip()][-1:]
    problem = [f"cannot be built: {''.join(said).strip()[:300]}"] if status else []
    return judged(
        name,
        problem,
        f"{', '.join(names)}: loaded after {time.perf_counter() - started:.0f} s",
        f"fix the compiler (see above), then `{build}`",
    )


def _is_built(builder_name: str) -> bool:
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(builder_name)
    return builder is not None and any(operators_folder().glob(f"**/{builder.name}.so"))


def main(names: list[str]) -> int:
    """Build the named operators; report how long each took; 1 if one is not available on this host."""
    from deepspeed.accelerator import get_accelerator

    status = 0
    for name in names:
        started = time.perf_counter()
        builder = get_accelerator().create_op_builder(name)
        if builder is None or not builder.is_compatible():
            print(f"{name}: not available on this host")
            status = 1
            continue
        builder.load(verbose=False)
        print(f"{name}: ready after {time.perf_counter() - started:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
