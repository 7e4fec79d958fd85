"""Start dualtok's own verbs on several ranks of this host, as a user would with torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dualtok.errors import DualtokError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType


def launch(arguments: list[str], processes: int, log: Path) -> None:
    """Run ``dualtok ARGUMENTS`` under torchrun; progress goes to the terminal, and everything to ``log`` as well.

    Raises:
        DualtokError: the job failed; names the command, the log and the last error line.
    """
    command = torchrun(["--standalone"], processes, "dualtok", arguments)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as copy, ended_by_sigterm():
        process = subprocess.Popen(
            command,
            env=rank_environment(processes),
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.STDOUT,
            errors="replace",
            start_new_session=True,
        )
        assert process.stdout is not None
        last_error = ""
        try:
            for line in process.stdout:
                copy.write(line)
                if line.startswith("dualtok: error:"):
                    last_error = line.strip()
                if is_progress(line):
                    print("  " + line.rstrip(), flush=True)
            status = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # the launcher's whole session: no rank is left behind
            process.wait()
            raise
    if status:
        reason = last_error or f"exit status {status}"
        raise DualtokError(f"`dualtok {' '.join(arguments)}` failed: {reason} (log: {log})")


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process by an exception, so that it ends its ranks first; by itself it would leave them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def torchrun(where: list[str], processes: int, module: str, arguments: list[str]) -> list[str]:
    """Return the command that starts ``python -m MODULE ARGUMENTS`` on ranks of this host.

    Args:
        where: torchrun's options about hosts; ``["--standalone"]`` for this one alone.
        processes: ranks on this host.
        module: what each rank runs.
        arguments: its arguments.
    """
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *where,
        f"--nproc-per-node={processes}",
        "-m",
        module,
        *arguments,
    ]


def rank_environment(processes: int) -> dict[str, str]:
    """Return the environment of so many ranks on this host: this process' own, completed."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    environment.setdefault("LOCAL_SIZE", str(processes))  # DeepSpeed's CPU accelerator counts its devices by it
    return environment


def is_progress(line: str) -> bool:
    """Return whether a line of a job's output is dualtok's own and worth showing."""
    return line.startswith(("train ", "score ", "audit ", "step ", "dualtok: "))
