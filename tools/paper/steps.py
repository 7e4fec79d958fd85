"""Commands that are run once each, in an order that their needs decide, and taken up again where they stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
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
class StepTime:
    """What a step took; its file of this is the mark that the step is done."""

    verb: str
    """Of ``dualtok``, or the name of a script."""
    wall: float
    """Unit: seconds."""
    processor: float
    """Of all its processes, user and system. Unit: seconds."""


def time_of(mark: Path) -> StepTime | None:
    """Return what a step took, or None if its mark, of an earlier version, does not say."""
    content = mark.read_text(encoding="utf-8")
    return StepTime(**json.loads(content)) if content else None


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


Ended = tuple[int, StepTime]
"""Status of a step's process, and what it took."""


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
        running: dict[Future[Ended], Step] = {}
        while (waiting and not failed) or running:
            ready = [step for step in waiting if done.issuperset(step.needs)][: jobs - len(running)]
            if not failed:
                for step in ready:
                    waiting.remove(step)
                    running[pool.submit(_execute, step)] = step
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step = running.pop(future)
                status, taken = future.result()
                if status:
                    failed = f"{step.name} failed with status {status}; see {_log(step)}"
                    continue
                write_text(step.mark, json.dumps(asdict(taken)))
                done.add(step.name)
                minutes = (time.monotonic() - started) / 60
                print(f"[{len(done)}/{len(unique)}] {step.name} ({minutes:.1f} min)", flush=True)
                after(step)
    if failed:
        raise SystemExit(failed)


def _log(step: Step) -> Path:
    return step.folder / "logs" / f"{step.mark.name}.log"


def _execute(step: Step) -> Ended:
    """Run one step as a process of its own."""
    verb = Path(step.arguments[0]).name
    if verb in ("export", "interpolate") and Path(step.arguments[2]).exists():
        return 0, StepTime(verb, 0, 0)  # both are atomic: the folder is whole, only its mark was lost
    started = time.monotonic()
    used = _log(step).with_suffix(".seconds")
    used.unlink(missing_ok=True)
    _log(step).parent.mkdir(parents=True, exist_ok=True)
    arguments = step.arguments if step.arguments[0].endswith(".py") else ("-m", "dualtok", *step.arguments)
    with _log(step).open("wb") as log:
        status = subprocess.run(
            [*warm.launcher(), *arguments],
            env={**os.environ, "PYTHONUNBUFFERED": "1", warm.NOTED: str(used)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    return status, StepTime(verb, time.monotonic() - started, float(used.read_text()))
