"""The server of warm processes: ``python -m tests.warm.server ADDRESS`` forks itself for each client."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import socket
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tests.warm import NOTED, PACKAGES, TEST_PROCESS, account
from tests.warm.client import HANDED_ON

if TYPE_CHECKING:
    from collections.abc import Callable

LONGEST_REQUEST, MOST_FILES = 1 << 20, 250
IMPORTED = (
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "dualtok.cli",
    "dualtok.data.prepare.pipeline",
    "dualtok.train.engines.pipeline",
    "dualtok.commands.train",
    "dualtok.commands.audit.run",
    "dualtok.commands.score.run",
    "peft.tuners.lora.bnb",
    "pyarrow.pandas_compat",
    "sklearn.ensemble",
    "sklearn.linear_model",
    "torch.distributed.run",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.optimization",
    "xml.dom.minidom",
)
"""What jobs import, all that they start included."""


class Forked(BaseException):
    """Unwinds the server's loop in a fork."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run


class Server:
    """Forks itself on demand until its standard input is closed."""

    def __init__(self, address: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(address)
        self._listener.listen(64)
        self._address = address
        self._alive: dict[int, socket.socket] = {}
        self._accounts: dict[int, list[str]] = {}
        """Fork -> the files in which its seconds are noted."""
        self._used: Counter[str] = Counter()
        self._watch(self._listener.fileno(), self._accept)
        self._watch(sys.stdin.fileno(), self._end)

    def serve(self) -> None:
        """Answer clients; raises :class:`Forked` in the forks."""
        while True:
            for key, _ in self._selector.select():
                if self._selector.get_map().get(key.fd) is key:  # what came before may have closed it
                    key.data()

    def _end(self) -> None:
        for process in self._alive:
            _kill_family(process)
        sys.exit()

    def _watch(self, file: int, what: Callable[[], None]) -> None:
        self._selector.register(file, selectors.EVENT_READ, what)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        self._watch(connection.fileno(), partial(self._fork, connection))

    def _fork(self, connection: socket.socket) -> None:
        self._selector.unregister(connection.fileno())
        message, files, _, _ = socket.recv_fds(connection, LONGEST_REQUEST, MOST_FILES)
        if not message:
            connection.close()
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)  # the server ignores them, and its fork must not
        request = json.loads(message)
        process = os.fork()
        if not process:
            for other in (connection, self._listener, *self._alive.values()):
                other.close()
            for key in list(self._selector.get_map().values()):
                with contextlib.suppress(OSError):
                    os.close(key.fd)
            self._selector.close()
            raise Forked(partial(_become, request, files))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
        for file in files:
            os.close(file)
        self._alive[process] = connection
        variables = request["variables"]
        self._accounts[process] = [variables[NOTED]] if NOTED in variables else []
        if TEST_PROCESS in variables:
            self._accounts[process].append(account(self._address, variables[TEST_PROCESS]))
        with contextlib.suppress(OSError):
            connection.send(str(process).encode())
        end = os.pidfd_open(process)
        self._watch(end, partial(self._ended, process, end))
        self._watch(connection.fileno(), partial(self._abandoned, process))

    def _ended(self, process: int, end: int) -> None:
        self._selector.unregister(end)
        os.close(end)
        _, status, usage = os.wait4(process, 0)
        for noted in self._accounts.pop(process):
            self._used[noted] += usage.ru_utime + usage.ru_stime
            written = Path(f"{noted}.new")
            written.write_text(str(self._used[noted]))
            written.replace(noted)
        connection = self._alive.pop(process)
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection.fileno())
        with contextlib.suppress(OSError):
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        connection.close()

    def _abandoned(self, process: int) -> None:
        """Its client has gone."""
        self._selector.unregister(self._alive[process].fileno())
        _kill_family(process)


def _kill_family(process: int) -> None:
    """Kill a fork and all that it has started, such as the clients of torchrun's ranks."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(process)
        for member in (first, *first.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def _become(request: dict[str, object], files: list[int]) -> None:
    """Make this fork what ``python ARGUMENTS`` would have started."""
    import inspect
    import multiprocessing
    import random
    import runpy
    import types

    import numpy as np

    # None of the places may still be one of the files when it is written over.
    places: list[int] = request["places"]  # type: ignore[assignment]
    beyond = [fcntl.fcntl(file, fcntl.F_DUPFD, max(places) + 1) for file in files]
    for file in files:
        os.close(file)
    for place, file in zip(places, beyond, strict=True):
        os.dup2(file, place)
        os.close(file)
    for number in HANDED_ON:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
    os.environ.clear()
    os.environ.update(request["variables"])  # type: ignore[call-overload]
    os.chdir(str(request["directory"]))
    os.umask(int(str(request["umask"])))
    random.seed()
    np.random.seed()
    by_lines = 1 if {"RANK", "PYTHONUNBUFFERED"} & os.environ.keys() else -1  # torchrun starts ranks with -u
    # As Python's own they do not close their files: those of a fork that serves forks are replaced in these.
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", by_lines, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, closefd=False)
    # torchrun asks inspect for its stack, which would look for the modules of these frames among all, again and again.
    frames = {str(Path("<frozen runpy>").absolute()): "runpy", __file__: __name__}
    inspect.modulesbyfile.update(frames)  # type: ignore[attr-defined]
    sys.executable = str(request["python"])  # what it starts with its own Python is forked as well
    multiprocessing.set_executable(sys.executable)
    what, *rest = request["arguments"]  # type: ignore[misc]
    sys.path[0] = str(Path.cwd() if what in ("-m", "-c") else Path(what).resolve().parent)
    if PACKAGES in os.environ:
        sys.path.insert(0, os.environ[PACKAGES])
    if what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = [what, *rest]
        runpy.run_path(what, run_name="__main__")


def _run_and_leave(program: Callable[[], None]) -> NoReturn:
    """Run a program and end as Python does, but for taking apart all modules, which are many: .3 s."""
    import atexit
    import threading

    status = 0
    try:
        program()
    except SystemExit as ending:
        status = _status_of(ending)
    except BaseException as error:
        status = 1
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            status = -signal.SIGINT
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader has gone, or the program closed it
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _status_of(ending: SystemExit) -> int:
    if ending.code is None or isinstance(ending.code, int):
        return (ending.code or 0) & 0xFF
    print(ending.code, file=sys.stderr)
    return 1


def serve(address: str) -> None:
    """Import what jobs need, then serve."""
    import gc
    import importlib
    import inspect

    import cpuinfo

    for module in IMPORTED:
        importlib.import_module(module)
    known = cpuinfo.get_cpu_info()
    cpuinfo.get_cpu_info = lambda: known  # starts a process for a second, each time that DeepSpeed asks
    inspect.stack()  # torchrun asks for its own; the files of all modules are looked up here, once
    gc.collect()
    gc.freeze()  # or the first collection in a fork would copy all memory
    for number in HANDED_ON:
        signal.signal(number, signal.SIG_IGN)
    try:
        Server(address).serve()
    except Forked as forked:
        become = forked.run
    _run_and_leave(become)


if __name__ == "__main__":
    serve(sys.argv[1])
