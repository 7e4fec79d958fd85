"""Stands for a fork of the server of warm processes: ``python -I -S client.py ADDRESS ARGUMENTS ...``.

It starts hundreds of times, so it imports little, and nothing of the tests.
"""

# To import pathlib would take as long as all the rest.
# ruff: noqa: PTH109, PTH120, PTH123, PTH208

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STANDS_FOR = "fork "
"""Name of a client's process, before its fork's number; Linux keeps 15 characters."""


def is_spawned(arguments: list[str]) -> bool:
    """Return whether this is a process that :mod:`multiprocessing` spawns, or its server that forks."""
    begins = ("from multiprocessing.spawn import spawn_main; ", "from multiprocessing.forkserver import main; ")
    return arguments[0] == "-c" and arguments[1].startswith(begins)


def inherited() -> list[int]:
    """Return the open files beside the first three; those that it needs are handed to a spawned process by number."""
    found = [int(name) for name in os.listdir("/proc/self/fd")]  # the listing's own is closed by then
    return sorted(number for number in found if number > 2 and os.path.lexists(f"/proc/self/fd/{number}"))


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
    request = {
        "arguments": arguments,
        "places": places,
        "python": f"{os.path.dirname(address)}/python",
        "directory": os.getcwd(),
        "variables": dict(os.environ),
        "umask": os.umask(0),
    }
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)  # until it is known whom to hand them to
    files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", places))]
    connection.sendmsg([json.dumps(request).encode()], files)
    process = int(connection.recv(64))
    with open("/proc/self/comm", "w") as name:
        name.write(f"{STANDS_FOR}{process}")
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


if __name__ == "__main__":
    client(sys.argv[1], sys.argv[2:])
