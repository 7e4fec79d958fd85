"""Hosts of a hostfile, and a conversation with each over ssh."""

from __future__ import annotations

import json
import os
import queue
import shlex
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtok.doctor.rank_job import python_here
from dualtok.errors import DualtokError

if TYPE_CHECKING:
    from types import TracebackType

PASSED_ON = (
    "NCCL_",
    "GLOO_",
    "UCX_",
    "DS_",
    "HF_",
    "CUDA_",
    "PYTHONPATH",
    "TORCH_",
    "OMP_",
    "TOKENIZERS_",
    "LD_LIBRARY_PATH",
)
"""Beginnings of the environment variables that hosts are given; a launcher must pass the same ones on."""
ANSWER_SECONDS = 120.0
SSH = "ssh"
OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


@dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: int
    """Ranks on it."""


class UnreachableError(DualtokError):
    """A host cannot be entered, does not answer, or has no dualtok where this one has it."""


class Session:
    """A doctor's agent on another host, while it is entered.

    Args:
        host: which.
        ssh: the command that enters a host, with options of the user's.
    """

    def __init__(self, host: Host, ssh: str = SSH) -> None:
        self.host = host
        self._ssh = shlex.split(ssh)
        self._answers: queue.Queue[bytes] = queue.Queue()

    def __enter__(self) -> Session:
        """Start the agent.

        Raises:
            UnreachableError: ssh fails, or there is no dualtok.
        """
        variables = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        remote = " ".join(
            [
                "cd",
                shlex.quote(str(Path.cwd())),
                "&&",
                "exec",
                "env",
                *(shlex.quote(f"{name}={value}") for name, value in variables.items()),
                shlex.quote(python_here()),
                "-m",
                "dualtok.doctor.agent",
            ]
        )
        self._errors = tempfile.TemporaryFile()  # closed when the session is left
        try:
            self._process = subprocess.Popen(
                [*self._ssh, *OPTIONS, "--", self.host.name, remote],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        except OSError as error:
            self._errors.close()
            raise UnreachableError(f"{self._ssh[0]}: {error.strerror}") from None
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.ask("read_clock", seconds=60)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """End the agent, which ends with its input."""
        self._leave()

    def ask(self, call: str, *, seconds: float = ANSWER_SECONDS, **arguments: Any) -> Any:
        """Return the agent's answer to one of its :data:`~dualtok.doctor.agent.REQUESTS`.

        Raises:
            UnreachableError: there is none in time, or the call failed there.
        """
        self.send(call, **arguments)
        return self.receive(seconds)

    def send(self, call: str, **arguments: Any) -> None:
        """Ask without waiting, so that hosts work beside each other."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"call": call, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # it has ended; receive() says why
            pass

    def receive(self, seconds: float = ANSWER_SECONDS) -> Any:
        """Return the answer to what was sent; raises as :meth:`ask`."""
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise UnreachableError(f"{self.host.name}: no answer after {seconds:.0f} s") from None
        if not line:
            raise UnreachableError(f"{self.host.name}: {self._last_error_line()}")
        found = json.loads(line)
        if "error" in found:
            raise UnreachableError(f"{self.host.name}: {found['error']}")
        return found["answer"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(b"{"):  # a login message may come first
                self._answers.put(line)
        self._answers.put(b"")

    def _last_error_line(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ssh ended with status {self._process.returncode}"

    def _leave(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._errors.close()
