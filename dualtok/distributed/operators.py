"""DeepSpeed's compiled operators: one process of a host builds each at a time, and nobody waits for it without a word.

torch waits for another process that compiles the same operator as long as its lock file is there, silently, and if that
process dies takes the operator for built. Here each operator is built under a lock of the system instead, which goes
with the process that holds it.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Any

from dualtok.distributed.jit_locks import is_held, is_shared, operators_folder
from dualtok.files import locked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Imported where they are used, for what they take to load: DeepSpeed (2 s).

POLL_SECONDS = 0.2
NOTICE_AFTER_SECONDS = 3.0
"""Shorter waits are not worth a line."""


def watch_operators() -> None:
    """Let every operator that this process loads from now on be built in turn, and told about.

    The environment's own ``ninja`` comes first in ``PATH``: each version takes what another has built for stale.
    """
    from deepspeed.ops.op_builder.builder import OpBuilder

    own = Path(sys.executable).with_name("ninja")
    if own.is_file():
        os.environ["PATH"] = os.pathsep.join([str(own.parent), os.environ.get("PATH", "")])
    if not hasattr(OpBuilder.jit_load, "__wrapped__"):
        OpBuilder.jit_load = _in_turn(OpBuilder.jit_load)


def _in_turn(jit_load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(jit_load)
    def load(builder: Any, *arguments: Any, **settings: Any) -> Any:
        folder, name = operators_folder(), str(builder.name)
        with _turn(folder, name):
            _wait_for_others(folder, name)
            with _notice(f"DeepSpeed compiles its operator {name} for this host, once; it takes a minute or more"):
                return jit_load(builder, *arguments, **settings)

    return load


@contextmanager
def _turn(folder: Path, name: str) -> Iterator[None]:
    """Wait until no other process of this host builds an operator, and keep others from it."""
    folder.mkdir(parents=True, exist_ok=True)

    def notify(holder: str) -> None:
        _print(f"waiting for {holder} to compile DeepSpeed's operator {name} in {folder}")

    # On a file system without locks, torch's own lock file is all there is.
    with locked(folder / f".{name}.turn", f"process {os.getpid()}", notify, NOTICE_AFTER_SECONDS):
        yield


def _wait_for_others(folder: Path, name: str) -> None:
    """Wait for a process that compiles the operator without dualtok, until its lock file is gone or nobody holds it."""
    began, said = time.monotonic(), False
    for lock in (*folder.glob(f"{name}/lock"), *folder.glob(f"*/{name}/lock")):
        while lock.exists():
            if not is_held(lock) and not is_shared(lock):
                time.sleep(POLL_SECONDS)  # its holder closes it a moment before it removes it
                if lock.exists() and not is_held(lock):
                    lock.unlink(missing_ok=True)
                    _print(f"removed {lock}, which a compilation that was killed had left")
                    break
            if not said and time.monotonic() - began > NOTICE_AFTER_SECONDS:
                other = "another host" if is_shared(lock) else "another process"
                _print(f"waiting for {other} to compile DeepSpeed's operator {name} ({lock})")
                said = True
            time.sleep(POLL_SECONDS)


@contextmanager
def _notice(line: str) -> Iterator[None]:
    """Say a line if what follows takes longer than a moment."""
    timer = Timer(NOTICE_AFTER_SECONDS, _print, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _print(line: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError, ValueError):  # a terminal that has gone must not stop the run
            print(f"dualtok: {line}", file=sys.stderr, flush=True)
