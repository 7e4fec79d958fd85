"""Processor time of commands that should answer at once, against what Python takes to import torch and transformers.

Each command and the import take turns, both in new processes: a run file that is missing, one with a typo, the status
of a run, and a plan. Start from a checkout; the plan is of launch/runs/.

    python tools/bench_startup.py [--pairs 7] [--run gpt2] [--only missing typo status plan]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmark_support import paired, print_ratio

HERE = Path(__file__).resolve().parent.parent
LIBRARIES = ["-c", "import torch, transformers"]
TYPO = "data: {dir: blocks}\nobjective: causal_lm\ntrain: {learning_rat: 1.0e-3, batch_size: 8, steps: 1}\n"


def main() -> None:
    """Measure in turns and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--run", default="gpt2", help="which of launch/runs/ is planned")
    parser.add_argument("--only", nargs="+", choices=("missing", "typo", "status", "plan"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for label, (status, arguments) in commands(Path(name), options.run).items():
            if options.only and label not in options.only:
                continue

            def command(arguments: list[str] = arguments, status: int = status) -> float:
                return seconds(["-m", "dualtok", *arguments], status)

            mine, libraries = paired(command, lambda: seconds(LIBRARIES, 0), options.pairs)
            print_ratio(f"{label}: processor time / import of torch and transformers", mine, libraries, "s")


def commands(folder: Path, run: str) -> dict[str, tuple[int, list[str]]]:
    """Return each command by its label, with the status that it must end with; writes what it reads."""
    (folder / "typo.yaml").write_text(TYPO, encoding="utf-8")
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    cluster = ["--nodes", "4", "--gpus", "8", "--device", "h100", "--tokens", "3000000"]
    return {
        "missing": (2, ["train", str(folder / "missing.yaml")]),
        "typo": (2, ["train", str(folder / "typo.yaml")]),
        "status": (0, ["status", str(folder / "run")]),
        "plan": (0, ["plan", f"launch/runs/{run}.yaml", *cluster]),
    }


def seconds(arguments: list[str], status: int) -> float:
    """Run Python and return the processor time that it took, s."""
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, ended, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(ended)
    if process.returncode != status:
        raise SystemExit(f"{' '.join(arguments)} ended with status {process.returncode}, not {status}")
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
