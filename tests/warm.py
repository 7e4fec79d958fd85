"""Processes of dualtok that start in milliseconds: forks of one that has imported torch, transformers and DeepSpeed.

Most of a small job's time on a CPU would be imports, some ten seconds in each rank. So the tests keep one server, which
has imported what a job needs and forks itself on demand; under ``pytest -n`` the test processes are such forks
themselves, and share it (``tests/conftest.py``). What tests start is this file as a small client, which stands for its
fork: it passes on its arguments, variables, working directory and the first three files, hands on signals and ends as
the fork ends; with the client, the fork ends. To torchrun, to :mod:`multiprocessing` and to a test it looks like
``python -m MODULE ...``, ``python -c PROGRAM ...`` or ``python SCRIPT.py ...``.

What differs from a process started afresh: its number and the command line that ``ps`` shows, that it outlives a client
that is killed by some milliseconds, resident memory (what is shared with the server counts), the seed of hashes (the
server's), and variables that are read on import (the server's; see :data:`READ_LATE`). Tests that depend on these start
processes of their own.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

READ_LATE = ("LOCAL_SIZE", "TORCH_EXTENSIONS_DIR", "AWS_", "WANDB_", "DUALTOK_", "HF_TOKEN", "MY_")
"""First letters of variables that no module reads on import, so that a fork may be given its own."""
FOR_ALL = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
"""Variables of every process: one thread per rank, DeepSpeed on the CPU."""
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
SHARED = "DUALTOK_TESTS_WARM"
"""Variable with the address of a server that test processes share, and the tree whose modules it has imported."""
ROOT = str(Path(__file__).resolve().parent.parent)
TEST_PROCESS = "PYTEST_XDIST_WORKER"
"""Variable with the name of the test process that has started something."""
PACKAGES = "DUALTOK_TESTS_PACKAGES"
"""Variable with a folder in which a fork looks for packages first: what it has not imported, and versions."""
STANDS_FOR = "fork "
"""Name of a client's process, before its fork's number; Linux keeps 15 characters."""
LONGEST_REQUEST, MOST_FILES = 1 << 20, 250
PROGRAMS = {"python": [], "dualtok": ["-m", "dualtok"], "torchrun": ["-m", "torch.distributed.run"],
            "deepspeed": ["-m", "deepspeed.launcher.runner"]}  # fmt: skip
"""What each stands for, as arguments of Python."""
IMPORTED = (
    "deepspeed.comm.mori", "deepspeed.module_inject.auto_ep_layer", "deepspeed.ops.op_builder.all_ops",
    "dualtok.cli", "dualtok.data.prepare", "dualtok.engine.pipeline", "dualtok.engine.train", "dualtok.jobs.audit",
    "dualtok.jobs.score", "peft.tuners.lora.bnb", "pyarrow.pandas_compat", "sklearn.ensemble", "sklearn.linear_model",
    "torch.distributed.run", "torch.utils.cpp_extension", "torch.utils.tensorboard",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama", "transformers.optimization",
    "xml.dom.minidom",
)  # fmt: skip
"""What jobs import, all that they start included."""


def takes(variables: Iterable[str]) -> bool:
    """Return whether forks can be given variables of these names."""
    return all(name.startswith(READ_LATE) for name in variables)


def programs() -> Path:
    """Return a folder of programs that fork: ``python``, ``dualtok``, ``torchrun`` and ``deepspeed``."""
    return Path(_server()).parent


def fork_of(client: int) -> int:
    """Return the number of the fork that a client, given by its own number, stands for; waits until there is one."""
    deadline = time.monotonic() + 60
    while not (name := Path(f"/proc/{client}/comm").read_text()).startswith(STANDS_FOR):
        assert time.monotonic() < deadline, "there is no fork"
        time.sleep(0.005)
    return int(name.removeprefix(STANDS_FOR))


def launcher() -> list[str]:
    """Return what stands for ``python`` where a fork will do."""
    return [str(programs() / "python")]


@contextlib.contextmanager
def spawning() -> Iterator[None]:
    """Have what :mod:`multiprocessing` spawns here forked by the server."""
    import multiprocessing

    multiprocessing.set_executable(launcher()[0])
    yield
    multiprocessing.set_executable(sys.executable)


def share() -> None:
    """Start a server for this process and for all that it starts."""
    os.environ[SHARED] = f"{_server()} {ROOT}"


def _shared() -> str | None:
    """Return the address of a server that this process shares with others of the same tree."""
    address, _, root = os.environ.get(SHARED, "").partition(" ")
    return address if root == ROOT else None


def seconds_of_forks() -> float:
    """Return what ended forks of a shared server have used for this test process, in seconds of the processors."""
    address, test_process = _shared(), os.environ.get(TEST_PROCESS)
    if address is None or test_process is None:
        return 0.0
    try:
        return float(_account(address, test_process).read_text())
    except FileNotFoundError:
        return 0.0


def _account(address: str, test_process: str) -> Path:
    return Path(address).with_name(f"used-{test_process}")


@cache
def _server() -> str:
    """Start this process's server, or find a shared one; returns its address."""
    if (shared := _shared()) is not None:
        return shared
    import atexit
    import subprocess
    import tempfile

    folder = tempfile.TemporaryDirectory(prefix="warm-")
    address = f"{folder.name}/server"
    _write_programs(Path(folder.name), address)
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.warm", "--serve", address], env={**clean, **FOR_ALL}, start_new_session=True,
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin is not None
    atexit.register(folder.cleanup)
    atexit.register(process.stdin.close)  # ends the server
    deadline = time.monotonic() + 120
    while not Path(address).exists():
        assert process.poll() is None, "the server of warm processes ended"
        assert time.monotonic() < deadline, "the server of warm processes did not start"
        time.sleep(0.05)
    return address


def _write_programs(folder: Path, address: str) -> None:
    import shlex

    for name, arguments in PROGRAMS.items():
        start = shlex.join([sys.executable, "-I", "-S", __file__, address, *arguments])
        (folder / name).write_text(f'#!/bin/sh\nexec {start} "$@"\n')
        (folder / name).chmod(0o755)
    beside_python = Path(sys.executable).with_name("ninja")  # DeepSpeed compiles with it
    (folder / "ninja").symlink_to(beside_python)


def is_spawned(arguments: list[str]) -> bool:
    """Return whether this is a process that :mod:`multiprocessing` spawns, or its server that forks."""
    begins = ("from multiprocessing.spawn import spawn_main; ", "from multiprocessing.forkserver import main; ")
    return arguments[0] == "-c" and arguments[1].startswith(begins)


def inherited() -> list[int]:
    """Return the open files beside the first three; those that it needs are handed to a spawned process by number."""
    found = (int(entry.name) for entry in list(Path("/proc/self/fd").iterdir()))
    return sorted(number for number in found if number > 2 and Path(f"/proc/self/fd/{number}").exists())


def needs_afresh(arguments: list[str]) -> bool:
    """Return whether a fork cannot do what ``python ARGUMENTS`` does.

    :mod:`multiprocessing` tracks resources in a process that needs no module; other options, search paths and seeds of
    hashes are read when Python starts.
    """
    if not arguments or (arguments[0] == "-c" and "multiprocessing" in arguments[1] and not is_spawned(arguments)):
        return True
    if os.environ.get("PYTHONPATH", "") not in ("", ROOT):
        return True
    return "PYTHONHASHSEED" in os.environ or (arguments[0].startswith("-") and arguments[0] not in ("-m", "-c"))


def client(address: str, arguments: list[str]) -> None:
    """Have the server run what ``python ARGUMENTS`` would, and end as that ends."""
    while arguments[:1] in (["-u"], ["-B"]):
        arguments = arguments[1:]
    if needs_afresh(arguments):
        os.execv(sys.executable, [sys.executable, *arguments])
    places = [0, 1, 2, *(inherited() if is_spawned(arguments) else [])]
    request = {"arguments": arguments, "places": places, "python": f"{Path(address).parent}/python",
               "directory": str(Path.cwd()), "variables": dict(os.environ), "umask": os.umask(0)}  # fmt: skip
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)  # until it is known whom to hand them to
    files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", places))]
    connection.sendmsg([json.dumps(request).encode()], files)
    process = int(connection.recv(64))
    Path("/proc/self/comm").write_text(f"{STANDS_FOR}{process}")
    for number in HANDED_ON:
        signal.signal(number, lambda received, _: _hand_on(process, received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
    answer = connection.recv(64)
    status = int(answer) if answer else -signal.SIGKILL
    if status < 0:
        if -status in HANDED_ON:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _hand_on(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(process, number)


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
        self._started_by: dict[int, str] = {}
        """Fork -> the test process it is for."""
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
        if TEST_PROCESS in request["variables"]:
            self._started_by[process] = request["variables"][TEST_PROCESS]
        with contextlib.suppress(OSError):
            connection.send(str(process).encode())
        end = os.pidfd_open(process)
        self._watch(end, partial(self._ended, process, end))
        self._watch(connection.fileno(), partial(self._abandoned, process))

    def _ended(self, process: int, end: int) -> None:
        self._selector.unregister(end)
        os.close(end)
        _, status, usage = os.wait4(process, 0)
        if test_process := self._started_by.pop(process, ""):
            self._used[test_process] += usage.ru_utime + usage.ru_stime
            account = _account(self._address, test_process)
            account.with_suffix(".new").write_text(str(self._used[test_process]))
            account.with_suffix(".new").replace(account)
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
    sys.path[0] = str(Path.cwd())
    if PACKAGES in os.environ:
        sys.path.insert(0, os.environ[PACKAGES])
    by_lines = 1 if {"RANK", "PYTHONUNBUFFERED"} & os.environ.keys() else -1  # torchrun starts ranks with -u
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", by_lines), os.fdopen(2, "w", 1)
    # torchrun asks inspect for its stack, which would look for the modules of these frames among all, again and again.
    frames = {str(Path("<frozen runpy>").absolute()): "runpy", __file__: "tests.warm"}
    inspect.modulesbyfile.update(frames)  # type: ignore[attr-defined]
    sys.executable = str(request["python"])  # what it starts with its own Python is forked as well
    multiprocessing.set_executable(sys.executable)
    what, *rest = request["arguments"]  # type: ignore[misc]
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
        sys.path[0] = str(Path(what).resolve().parent)
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


def server(address: str) -> None:
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
    if sys.argv[1] == "--serve":
        server(sys.argv[2])
    else:
        client(sys.argv[1], sys.argv[2:])
