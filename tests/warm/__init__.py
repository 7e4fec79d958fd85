"""Processes of dualtok that start in milliseconds: forks of one that has imported torch, transformers and DeepSpeed.

Most of a small job's time on a CPU would be imports, some ten seconds in each rank. So the tests keep one server, which
has imported what a job needs and forks itself on demand; under ``pytest -n`` the test processes are such forks
themselves, and share it (``tests/conftest.py``). What tests start is a small client (:mod:`tests.warm.client`), which
stands for its fork: it passes on its arguments, variables, working directory and the first three files, hands on
signals and ends as the fork ends; with the client, the fork ends. To torchrun, to :mod:`multiprocessing` and to a test
it looks like ``python -m MODULE ...``, ``python -c PROGRAM ...`` or ``python SCRIPT.py ...``. The steps of
``tools/reproduce_paper.py`` are started in the same way, from a server of its own.

What differs from a process started afresh: its number and the command line that ``ps`` shows, that it outlives a client
that is killed by some milliseconds, resident memory (what is shared with the server counts), the seed of hashes (the
server's), and variables that are read on import (the server's; see :data:`READ_LATE`). Tests that depend on these start
processes of their own.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tests.warm.client import ROOT, STANDS_FOR

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

CLIENT = Path(__file__).with_name("client.py")
READ_LATE = ("LOCAL_SIZE", "TORCH_EXTENSIONS_DIR", "AWS_", "WANDB_", "DUALTOK_", "HF_TOKEN", "MY_")
"""First letters of variables that no module reads on import, so that a fork may be given its own."""
FOR_ALL = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
"""Variables of the tests' processes: one thread per rank, DeepSpeed on the CPU."""
SHARED = "DUALTOK_TESTS_WARM"
"""Variable with the address of a server that test processes share, and the tree whose modules it has imported."""
TEST_PROCESS = "PYTEST_XDIST_WORKER"
"""Variable with the name of the test process that has started something."""
NOTED = "DUALTOK_TESTS_NOTED"
"""Variable with a file in which the server notes the seconds of the processors that ended forks with it have used."""
PACKAGES = "DUALTOK_TESTS_PACKAGES"
"""Variable with a folder in which a fork looks for packages first: what it has not imported, and versions."""
PROGRAMS = {
    "python": [],
    "dualtok": ["-m", "dualtok"],
    "torchrun": ["-m", "torch.distributed.run"],
    "deepspeed": ["-m", "deepspeed.launcher.runner"],
}
"""What each stands for, as arguments of Python."""


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


def share(variables: Mapping[str, str] = FOR_ALL) -> None:
    """Start a server for this process and for all that it starts; ``variables`` are set where it imports."""
    os.environ[SHARED] = f"{_server(tuple(variables.items()))} {ROOT}"


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
        return float(Path(account(address, test_process)).read_text())
    except FileNotFoundError:
        return 0.0


def account(address: str, test_process: str) -> str:
    """Return the file in which a server notes what its forks have used for a test process."""
    return f"{address}-used-{test_process}"


@cache
def _server(variables: tuple[tuple[str, str], ...] = tuple(FOR_ALL.items())) -> str:
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
        [sys.executable, "-m", "tests.warm.server", address],
        env={**clean, **dict(variables)},
        start_new_session=True,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
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
        start = shlex.join([sys.executable, "-I", "-S", str(CLIENT), address, *arguments])
        (folder / name).write_text(f'#!/bin/sh\nexec {start} "$@"\n')
        (folder / name).chmod(0o755)
    beside_python = Path(sys.executable).with_name("ninja")  # DeepSpeed compiles with it
    (folder / "ninja").symlink_to(beside_python)
