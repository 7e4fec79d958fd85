"""Commands as forks of this process: what they import is imported once, and not by each of them again.

Only on Linux hosts without an accelerator: a fork cannot use a device that its parent may have touched. Ranks of a
launcher are always processes of their own.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dualtok.commands.quiet import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Sequence

ACCELERATORS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""Files of the drivers of NVIDIA and AMD, and of both under WSL."""
TRAINING = (
    "deepspeed.ops.op_builder.all_ops",
    "dualtok.commands.train",
    "torch.utils.tensorboard",
    "transformers.optimization",
)
IMPORTED = {
    "prepare": ("dualtok.data.prepare.pipeline", "transformers"),
    "train": TRAINING,
    "export": ("dualtok.commands.export",),
    "score": (*TRAINING, "dualtok.commands.score.run"),
    "audit": (*TRAINING, "dualtok.commands.audit.run", "sklearn.ensemble", "sklearn.linear_model"),
    "interpolate": (*TRAINING, "dualtok.commands.interpolate"),
    "report": ("dualtok.commands.report",),
}
"""Verb -> what it imports, those that are imported late included."""


def can_fork() -> bool:
    """Return whether commands can be forks of this process.

    Another program's process may have threads, files and things to do at its end that a fork of it would do as well.
    """
    return (
        sys.platform == "linux"
        and os.environ.get("DUALTOK_FORK", "1") != "0"
        and not any(Path(name).exists() for name in ACCELERATORS)
        and threading.active_count() == 1
        and _program() == "dualtok"
    )


def _program() -> str:
    """Return the name of the program that this process is."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def import_for(verb: str) -> None:
    """Import what a verb will need, so that all forks have it."""
    if verb != "report":
        quiet_libraries()
    for module in IMPORTED[verb]:
        importlib.import_module(module)


def fork(arguments: Sequence[str], variables: dict[str, str], output: int) -> int:
    """Start ``dualtok ARGUMENTS`` as a fork in a session of its own; returns its process number.

    Args:
        arguments: of the command line.
        variables: its environment.
        output: file descriptor that becomes its standard output and standard error.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for file, place in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(file, place)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        os.environ.clear()
        os.environ.update(variables)
        sys.stdout = os.fdopen(1, "w", 1, encoding="utf-8", errors="replace", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="replace", closefd=False)
        _become(list(arguments))
    finally:
        os._exit(1)


def _become(arguments: list[str]) -> NoReturn:
    """Do what ``python -m dualtok ARGUMENTS`` does, and end."""
    sys.argv = ["dualtok", *arguments]
    status = 0
    try:
        runpy.run_module("dualtok", run_name="__main__", alter_sys=True)
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException as error:  # a bug of the command's, which is told as Python would
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    _end(status)


def _end(status: int) -> NoReturn:
    """End like Python, but for taking all modules apart."""
    import atexit  # here, as nothing else may use what is private in it

    with contextlib.suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
