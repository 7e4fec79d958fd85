"""One process's way to the objects at an address: an fsspec file system that gives up a transfer which stands still."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

import fsspec.asyn
from fsspec.callbacks import Callback

from dualtok.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from dualtok.config.data import StreamConfig

# Imported where they are used, for they need not be installed or wanted: aiohttp.

EXTRAS = {
    "s3": "dualtok[s3]",
    "http": "dualtok[http]",
    "https": "dualtok[http]",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
}
"""What to install for a protocol whose package is missing."""
POLL_SECONDS = 0.5
SLOWEST_UPLOAD = 2**16
"""Bytes per second; an upload of one piece does not tell how far it is."""


class Connection:
    """An fsspec file system in this process, rooted at an address.

    Raises:
        ConfigError: there is no such protocol, its package or one of its environment variables is missing.
    """

    def __init__(self, address: str, settings: StreamConfig) -> None:
        protocol = address.partition("://")[0]
        if protocol not in fsspec.available_protocols():
            near = did_you_mean(protocol, fsspec.available_protocols())
            raise ConfigError(f"data.dir: {address}: no protocol {protocol!r}{near}")
        self._timeout = settings.timeout_seconds
        try:
            self.fs, self._root = fsspec.url_to_fs(
                address, skip_instance_cache=True, use_listings_cache=False, **_options(protocol, settings)
            )
        except ImportError as error:
            package = EXTRAS.get(protocol)
            hint = f"; pip install '{package}'" if package else ""
            raise ConfigError(f"data.dir: {address}: {' '.join(str(error).split())[:120]}{hint}") from None
        if protocol == "s3":
            self.fs.retries = 1  # its own attempts would multiply with ours
        if hasattr(self.fs, "set_session"):
            # Now, by one thread: it takes seconds of work, which are no silence of the server's.
            fsspec.asyn.sync(self.fs.loop, self.fs.set_session)

    def download(self, name: str, target: Path) -> None:
        """Write an object to a local file, as it arrives.

        Raises:
            TimeoutError: no byte came for ``timeout_seconds``. (File systems that are not asynchronous have time-outs
                of their own; so for the other methods.)
            Exception: whatever the file system raises.
        """
        if not self.fs.async_impl:
            self.fs.get_file(self._path(name), str(target))
            return
        self._finish(lambda arrived: self.fs._get_file(self._path(name), str(target), callback=arrived), self._timeout)

    def upload(self, source: Path, name: str) -> None:
        """Write a local file as one object.

        Raises:
            TimeoutError: it takes longer than ``timeout_seconds`` and what its bytes need at ``SLOWEST_UPLOAD``.
            Exception: whatever the file system raises.
        """
        if not self.fs.async_impl:
            self.fs.put_file(str(source), self._path(name))
            return
        patience = self._timeout + source.stat().st_size / SLOWEST_UPLOAD
        self._finish(lambda sent: self.fs._put_file(str(source), self._path(name), callback=sent), patience)

    def names(self, folder: str) -> list[str]:
        """Return the names right under a folder.

        Raises:
            FileNotFoundError: there is no such folder.
            Exception: whatever the file system raises.
        """
        path = self._path(folder)
        if self.fs.async_impl:
            found = self._finish(lambda _: self.fs._ls(path, detail=False), self._timeout)
        else:
            found = self.fs.ls(path, detail=False)
        return [str(each).rstrip("/").rsplit("/", 1)[-1] for each in found]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _finish(self, operation: Callable[[Callback], Coroutine[Any, Any, Any]], patience: float) -> Any:
        """Return an operation's result, given up when its callback counts no byte for ``patience`` seconds."""
        moved = Callback()
        future = asyncio.run_coroutine_threadsafe(operation(moved), self.fs.loop)
        seen, since = moved.value, time.monotonic()
        while True:
            try:
                return future.result(timeout=min(POLL_SECONDS, self._timeout))
            except TimeoutError:
                if future.done():  # the file system's own
                    raise
            if moved.value != seen:
                seen, since = moved.value, time.monotonic()
            elif time.monotonic() - since >= patience:
                future.cancel()
                raise TimeoutError(f"no byte for {patience:g} s")


def _options(protocol: str, settings: StreamConfig) -> dict[str, Any]:
    """Return the file system's options: the user's, and time-outs where fsspec's defaults would not do."""
    options = dict(settings.storage_options)
    for option, variable in settings.storage_environment.items():
        if variable not in os.environ:
            raise ConfigError(f"data.stream.storage_environment.{option}: there is no environment variable {variable}")
        options[option] = os.environ[variable]
    if settings.endpoint_url is not None and protocol != "s3":
        raise ConfigError(f"data.stream.endpoint_url: has no effect on {protocol}://; remove it")
    if protocol == "s3":
        if settings.endpoint_url is not None:
            options["endpoint_url"] = settings.endpoint_url
        own = {
            "read_timeout": settings.timeout_seconds,
            "connect_timeout": settings.timeout_seconds,
            "retries": {"total_max_attempts": 1},
        }
        options["config_kwargs"] = own | options.get("config_kwargs", {})
    if protocol in ("http", "https"):
        try:
            import aiohttp
        except ImportError:
            return options  # fsspec says what is missing
        # aiohttp's default ends every transfer after five minutes, however well it goes.
        patience = aiohttp.ClientTimeout(
            total=None, sock_connect=settings.timeout_seconds, sock_read=settings.timeout_seconds
        )
        options["client_kwargs"] = {"timeout": patience} | options.get("client_kwargs", {})
    return options
