"""The doctor on one host: answers requests, one JSON object per line, until its input ends.

``ssh HOST python -m dualtok.doctor.agent`` starts it; :mod:`dualtok.doctor.hosts` asks. Standard output carries answers
alone: whatever a library prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtok.distributed.network import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

# Imported where they are used, for what they take to load: torch (1 s), and parts of dualtok that need it. The clock
# must be answered at once.

CONNECT_SECONDS = 5.0
GREETING = b"dualtok doctor"


def read_clock() -> float:
    """Return this host's clock, in seconds since 1970."""
    return time.time()


def read_versions() -> dict[str, str]:
    """Return what must be equal on all hosts."""
    import torch

    from dualtok.doctor.versions import TESTED
    from dualtok.versions import installed_versions

    found = installed_versions(TESTED)
    if torch.cuda.is_available():
        found |= {
            "CUDA of torch": str(torch.version.cuda),
            "GPU": torch.cuda.get_device_name(0),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }
    driver = Path("/sys/module/nvidia/version")
    if driver.is_file():
        found["NVIDIA driver"] = driver.read_text().strip()
    return found


def examine_machine(run: dict[str, Any] | None, folder: str, quick: bool, ranks: int | None) -> list[dict[str, Any]]:
    """Make the checks of one host."""
    from dualtok.config.load import parse_run
    from dualtok.doctor.examine import machine_checks
    from dualtok.doctor.result import Subject

    subject = Subject(Path(folder), None if run is None else parse_run(run), quick)
    return [asdict(result) for result in machine_checks(subject, ranks)]


def listen(host: str) -> int:
    """Open a port on the address that ``host`` has here, greet whoever connects, and return its number."""
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
        server = socket.create_server((str(address), 0))
    except OSError:  # the name means another address here: all of them then
        server = socket.create_server(("", 0))

    def greet() -> None:
        while True:
            connection, _ = server.accept()
            with connection:
                connection.sendall(GREETING)

    threading.Thread(target=greet, daemon=True).start()
    return int(server.getsockname()[1])


def connect(host: str, port: int) -> str | None:
    """Return why another host's port cannot be reached; None if it greets."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
            received = connection.recv(len(GREETING))
    except OSError as error:
        return str(error.strerror or error)
    return None if received == GREETING else "something else answers there"


def read_file(file: str) -> str | None:
    """Return a file's text; None if this host does not see it."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError:
        return None


def write_file(file: str, text: str) -> str | None:
    """Write a file; returns why it cannot be."""
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        return str(error.strerror)
    return None


def ranks(job: dict[str, Any]) -> dict[str, Any]:
    """Run this host's ranks of a job."""
    from dualtok.doctor.rank_job import as_job, run_ranks

    return asdict(run_ranks(as_job(job)))


REQUESTS: dict[str, Callable[..., Any]] = {
    call.__name__: call
    for call in (read_clock, read_versions, examine_machine, listen, connect, free_port, read_file, write_file, ranks)
}


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Started by ssh the shell has read no profile. As in an environment that is activated, its own ninja comes first:
    # another version would compile all operators again, and the next job with the first one too.
    os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', os.defpath)}"  # noqa: PTH120
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": REQUESTS[request.pop("call")](**request)}
        except Exception as error:  # the one who asks reports it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
