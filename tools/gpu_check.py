"""One command for a machine with a GPU: what it computes right, how fast, and with how much memory.

* parity: the same small dual run on host cores and on the device, with modes of the reference, ZeRO-3, a resumed run
  and, where there are two devices, pipelines; losses and gradients compared step by step;
* commands: DP-SGD, LoRA, the audit and the doctor, as a user would run them;
* loss backends: each one's check, time and memory on a large output layer;
* steps: dualtok's plain and dual step, and each mode of the reference, against the Hugging Face Trainer's plain step
  and a naive dual step (two forward passes over full logits); with model FLOPs utilization.

    python tools/gpu_check.py [--folder runs/gpu-check] [--only machine parity command head step] [--output table.md]

Each measurement is a process of its own, one after the other on the idle device (the runs of parity, which are not
timed, some at once); the figures are medians. A measurement that fails is a row of the table, and so is a run whose
losses are too far off; the exit status is then 1. Without a GPU the sizes are small: the ways are
the same, the figures say nothing about a GPU. The reference of mode ``cpu`` is a small one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

KINDS = ("machine", "parity", "command", "head", "step")


def main() -> int:
    """Run the measurements that were asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu-check"), help="for blocks, weights and runs")
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(KINDS),
        metavar="KIND[:NAME]",
        help=f"{', '.join(KINDS)}, or one of them like step:dual",
    )
    parser.add_argument("--ways", nargs="+", default=None, metavar="WAY", help="of parity, e.g. bf16; without it all")
    parser.add_argument("--output", type=Path, default=None, help="also write the table to this file")
    parser.add_argument("--deadline", type=float, default=900.0, help="seconds after which a measurement has failed")
    parser.add_argument("--measure", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.folder, options.ways)))
        return 0
    from gpu.commands import COMMANDS, WAYS, too_far
    from gpu.measure import HEADS, STEPS
    from gpu.table import markdown

    several = {"command": COMMANDS, "head": HEADS, "step": STEPS}
    every = ["machine", "parity", *(f"{kind}:{name}" for kind, names in several.items() for name in names)]
    unknown = [name for name in options.only if name not in (*KINDS, *every)]
    if unknown:
        parser.error(f"--only: no measurement {unknown[0]!r}; there are {', '.join((*KINDS, *every))}")
    unknown = [name for name in options.ways or () if name not in WAYS]
    if unknown:
        parser.error(f"--ways: no way {unknown[0]!r}; there are {', '.join(WAYS)}")
    if options.ways and "parity" not in options.only:
        parser.error("--ways: has no effect without --only parity")
    options.folder.mkdir(parents=True, exist_ok=True)
    chosen = dict.fromkeys(
        name for wanted in options.only for name in every if wanted in (name, name.split(":")[0])
    )  # in the order that was asked for
    results: dict[str, Any] = {}
    for name in ["prepare", *chosen]:
        started = time.monotonic()
        results[name] = in_a_fresh_process(name, options)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        (options.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    table = markdown(results)
    print(table)
    if options.output is not None:
        options.output.write_text(table + "\n")
    parity = results.get("parity", {})
    unlike = any(too_far(name, figures) for name, figures in parity.get("unlike", {}).items())
    failed = any("error" in figures for name, figures in results.items() if name not in optional(results))
    return int(failed or unlike or bool(parity.get("failed")))


def optional(results: dict[str, Any]) -> set[str]:
    """Return the measurements that this machine cannot be expected to make: kernels that are not installed."""
    return {
        name
        for name, figures in results.items()
        if name.startswith("head:") and any(s in figures.get("error", "") for s in ("is not installed", "needs a GPU"))
    }


def measure(name: str, folder: Path, ways: list[str] | None) -> dict[str, Any]:
    """Make one measurement in this process."""
    from gpu import commands
    from gpu import measure as measurements

    kind, _, which = name.partition(":")
    if kind == "prepare":
        measurements.prepare(folder)
        return {}
    if kind == "machine":
        return measurements.machine()
    if kind == "parity":
        return commands.parity(folder, ways)
    if kind == "command":
        return commands.command(which, folder)
    return measurements.head(which) if kind == "head" else measurements.step(which, folder)


def in_a_fresh_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return a measurement's figures, or its last error line under ``error``."""
    command = [sys.executable, str(Path(__file__)), "--folder", str(options.folder), "--measure", name]
    if options.ways is not None:
        command += ["--ways", *options.ways]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=options.deadline)
    except subprocess.TimeoutExpired:
        end(process)
        return {"error": f"not done after {options.deadline:g} s"}
    lines = [line for line in (errors if process.returncode else output).splitlines() if line.strip()]
    if process.returncode == 0 and lines:
        figures: dict[str, Any] = json.loads(lines[-1])
        return figures
    print(errors[-4000:], file=sys.stderr)
    return {"error": lines[-1].strip()[:300] if lines else f"exit status {process.returncode}"}


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it has started, which would else disturb what is timed next.

    Each is stopped first, until no other has appeared: what is stopped starts nothing more.
    """
    members: set[psutil.Process] = set()
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        while found := {first, *first.children(recursive=True)} - members:
            for member in found:
                with suppress(psutil.NoSuchProcess):
                    member.suspend()
            members |= found
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()
    psutil.wait_procs(members, timeout=10)


if __name__ == "__main__":
    sys.exit(main())
