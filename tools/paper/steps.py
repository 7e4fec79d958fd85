"""Commands that are run once each, in an order that their needs decide, and taken up again where they stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dualtok.files import write_text
from tests import warm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IMPORTING = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Variables of the process that all steps are forked from: once CUDA is open in it, it would be of no use in a fork."""


@dataclass(frozen=True)
class Step:
    """One command, run once when all that it needs is done."""

    name: str
    folder: Path
    """Of the cell."""
    arguments: tuple[str, ...]
    """Of ``dualtok``, or a script and its own."""
    needs: tuple[str, ...] = ()
    """Names of other steps."""

    @property
    def mark(self) -> Path:
        """File that says the step is done."""
        return self.folder / "done" / self.name.rsplit("/", maxsplit=1)[-1].replace(" ", "_")


def carry_out(steps: Sequence[Step], jobs: int, after: Callable[[Step], None]) -> None:
    """Run the steps that are not done, at most ``jobs`` at once, each after those it needs.

    Raises:
        SystemExit: a step failed; names it and its log. Steps that were running are waited for.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warm.share(IMPORTING)
    unique = {step.name: step for step in steps}
    done = {name for name, step in unique.items() if step.mark.is_file()}
    waiting = [step for name, step in unique.items() if name not in done]
    started, failed = time.monotonic(), ""
    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[int], Step] = {}
        while (waiting and not failed) or running:
            ready = [step for step in waiting if done.issuperset(step.needs)][: jobs - len(running)]
            if not failed:
                for step in ready:
                    waiting.remove(step)
                    running[pool.submit(_execute, step)] = step
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step = running.pop(future)
                if future.result():
                    failed = f"{step.name} failed with status {future.result()}; see {_log(step)}"
                    continue
                write_text(step.mark, "")
                done.add(step.name)
                minutes = (time.monotonic() - started) / 60
                print(f"[{len(done)}/{len(unique)}] {step.name} ({minutes:.1f} min)", flush=True)
                after(step)
    if failed:
        raise SystemExit(failed)


def _log(step: Step) -> Path:
    return step.folder / "logs" / f"{step.mark.name}.log"


def _execute(step: Step) -> int:
    """Run one step as a process of its own and return its status."""
    if step.arguments[0] in ("export", "interpolate") and Path(step.arguments[2]).exists():
        return 0  # both are atomic: the folder is whole, only its mark was lost
    _log(step).parent.mkdir(parents=True, exist_ok=True)
    arguments = step.arguments if step.arguments[0].endswith(".py") else ("-m", "dualtok", *step.arguments)
    with _log(step).open("wb") as log:
        return subprocess.run(
            [*warm.launcher(), *arguments],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
