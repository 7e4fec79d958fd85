"""Objects at an address (``s3://``, ``gs://``, ``hf://``, ``https://``, ...): read again and again if need be, and
accepted only with the right checksum.

A failing attempt is repeated with growing random pauses, within a number of attempts and a time. Messages name the
object, the attempt and the reason, never a secret.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_before_delay, wait_random_exponential

from dualtok.data.remote.connection import Connection
from dualtok.errors import ConfigError, DataError
from dualtok.files import file_sha256

if TYPE_CHECKING:
    from collections.abc import Callable

    from tenacity import RetryCallState

    from dualtok.config.data import StreamConfig

Result = TypeVar("Result")
LOG = logging.getLogger(__name__)
LOCAL_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of this host's disk, not of the remote."""
READ_ONLY = "{}: nothing can be written there; use a copy in a local folder or an object store"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0


class BadShardError(DataError):
    """A file of the prepared data is missing, or is not the one that was prepared."""


class _CorruptError(Exception):
    """An object arrived with another size or checksum than it was made with."""


class _GivenUp(Exception):  # noqa: N818  (not an error yet: its cause decides what becomes of it)
    """The last attempt's failure, told for the user."""

    def __init__(self, message: str, cause: Exception) -> None:
        super().__init__(message)
        self.cause = cause


class Storage:
    """The objects under one address. Several threads may use it; it can be sent to another process, and forked.

    Args:
        address: e.g. ``s3://bucket/prepared``.
        settings: access, attempts and time-outs.
    """

    def __init__(self, address: str, settings: StreamConfig) -> None:
        self.address = address.rstrip("/")
        self._settings = settings
        self._connected: tuple[int, Connection] | None = None

    @property
    def is_web_server(self) -> bool:
        """Whether names cannot be asked for and nothing can be written."""
        return self.address.startswith(("http://", "https://"))

    def read(self, name: str, *, patient: bool = True) -> bytes:
        """Return a small object.

        Args:
            name: its path below the address.
            patient: whether a missing or forbidden one is asked for again, as after every other failure.

        Raises:
            FileNotFoundError: it is missing.
            DataError: it cannot be read.
        """
        with TemporaryDirectory(prefix="dualtok-") as folder:
            target = Path(folder) / "object"
            try:
                self._persist(
                    name,
                    lambda: self.connect().download(name, target),
                    final=() if patient else (FileNotFoundError, PermissionError),
                )
            except _GivenUp as problem:
                if isinstance(problem.cause, FileNotFoundError):
                    raise FileNotFoundError(f"{self.address}/{name}") from None
                raise DataError(str(problem)) from None
            return target.read_bytes()

    def fetch(self, name: str, target: Path, *, sha256: str, size: int | None = None) -> None:
        """Write an object to a local file, and compare it with what it should be.

        Raises:
            BadShardError: it is missing or altered, and stays so.
            DataError: it cannot be read, or not be kept on this host.
        """

        def attempt() -> None:
            self.connect().download(name, target)
            arrived = target.stat().st_size
            if size is not None and arrived != size:
                raise _CorruptError(f"{arrived} bytes arrived, the manifest says {size}")
            if file_sha256(target) != sha256:
                raise _CorruptError("its checksum differs from the one it was made with")

        try:
            self._persist(name, attempt)
        except _GivenUp as problem:
            cause = problem.cause
            if isinstance(cause, OSError) and cause.errno in LOCAL_FAULTS:
                raise DataError(
                    f"{target.parent}: {os.strerror(cause.errno)} while {self.address}/{name} was fetched; make room, "
                    "or choose another data.stream.cache_dir"
                ) from None
            is_bad = isinstance(cause, FileNotFoundError | _CorruptError)
            raise (BadShardError if is_bad else DataError)(str(problem)) from None

    def put(self, source: Path, name: str) -> None:
        """Write a local file as one object, which object stores show only when it is whole.

        Raises:
            DataError: it cannot be written.
            ConfigError: nothing can be written to this address.
        """

        if self.is_web_server:
            raise ConfigError(READ_ONLY.format(self.address))

        try:
            self._persist(
                name, lambda: self.connect().upload(source, name), final=(NotImplementedError, PermissionError)
            )
        except _GivenUp as problem:
            if isinstance(problem.cause, NotImplementedError):
                raise ConfigError(READ_ONLY.format(self.address)) from None
            raise DataError(str(problem)) from None

    def names(self, folder: str) -> list[str]:
        """Return the names right under a folder, sorted; none if there is no such folder."""

        try:
            return sorted(self._persist(folder, lambda: self.connect().names(folder), final=(FileNotFoundError,)))
        except _GivenUp as problem:
            if isinstance(problem.cause, FileNotFoundError):
                return []
            raise DataError(str(problem)) from None

    def _persist(self, name: str, action: Callable[[], Result], *, final: tuple[type[Exception], ...] = ()) -> Result:
        """Return ``action()``, tried as often and as long as the settings allow.

        Raises:
            _GivenUp: the last attempt failed.
        """
        settings = self._settings
        hopeless: tuple[type[Exception], ...] = (DataError, ConfigError, *final)

        def report_retry(state: RetryCallState) -> None:
            assert state.outcome is not None
            LOG.warning(
                "dualtok: %s/%s: attempt %d of %d failed: %s; again in %.1f s",
                self.address,
                name,
                state.attempt_number,
                settings.attempts,
                self._reason(state.outcome.exception()),
                state.upcoming_sleep,
            )

        retrying = Retrying(
            stop=stop_after_attempt(settings.attempts) | stop_before_delay(settings.retry_seconds),
            wait=wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE),
            retry=retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, hopeless)),
            before_sleep=report_retry,
            reraise=True,
        )
        started = time.monotonic()
        try:
            return retrying(action)
        except (DataError, ConfigError):
            raise
        except Exception as error:  # every file system has classes of its own
            count = retrying.statistics["attempt_number"]
            attempts = f"{count} attempt{'s' * (count > 1)} in {time.monotonic() - started:.0f} s"
            message = f"{self.address}/{name}: given up after {attempts}: {self._reason(error)}"
            raise _GivenUp(message, error) from None

    def _reason(self, error: BaseException | None) -> str:
        """Return what went wrong in one line without secrets: no signed queries, no passwords, no known values."""
        if isinstance(error, FileNotFoundError):
            return "there is no such object"
        if isinstance(error, _CorruptError):
            return str(error)
        text = " ".join(str(error).split())
        text = re.sub(r"\?[^\s'\")]+", "?...", text)
        text = re.sub(r"//\S+@", "//...@", text)
        for variable in self._settings.storage_environment.values():
            if value := os.environ.get(variable):
                text = text.replace(value, "...")
        return f"{type(error).__name__}: {text[:200]}"

    def connect(self) -> Connection:
        """Return this process's connection. Without a lock, which a fork might copy while another thread holds it."""
        made = self._connected
        if made is None or made[0] != os.getpid():  # one that was made before a fork belongs to the parent
            made = self._connected = os.getpid(), Connection(self.address, self._settings)
        return made[1]

    def __getstate__(self) -> dict[str, object]:
        """Leave the connection behind."""
        return {"address": self.address, "_settings": self._settings}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take over another process's storage."""
        self.__dict__.update(state, _connected=None)
