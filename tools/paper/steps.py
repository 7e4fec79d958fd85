"""Commands that are run once each, in an order that their needs decide, and taken up again where they stopped."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import runpy
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dualtok.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IMPORTED_ONCE = [
    "dualtok.cli",
    "dualtok.data.prepare.pipeline",
    "dualtok.commands.train",
    "dualtok.commands.audit.run",
    "dualtok.commands.score.run",
    "deepspeed.module_inject.auto_ep_layer",
    "peft",
    "sklearn.ensemble",
    "sklearn.linear_model",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.optimization",
]
"""A step is forked from a process that has imported these; to do so itself would take it some ten seconds."""

_PROCESSES = threading.Lock()
"""Start and join look at all processes of :mod:`multiprocessing`, which no two threads may do at once."""


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
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED_ONCE)
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
    process = multiprocessing.get_context("forkserver").Process(target=_become, args=(step.arguments, _log(step)))
    with _PROCESSES:
        process.start()
    multiprocessing.connection.wait([process.sentinel])
    with _PROCESSES:
        process.join()
    return process.exitcode or 0


def _become(arguments: Sequence[str], log: Path) -> None:
    """Do what ``dualtok ...`` or ``python tools/...`` would, with all output in the log."""
    with log.open("wb") as stream:
        for output in (sys.stdout, sys.stderr):
            os.dup2(stream.fileno(), output.fileno())
            output.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    script = arguments[0].endswith(".py")
    sys.argv = list(arguments) if script else ["dualtok", *arguments]
    if script:
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        runpy.run_module("dualtok", run_name="__main__")
