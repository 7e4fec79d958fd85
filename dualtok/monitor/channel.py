"""Places to which figures are written, and which must not end or delay a training that could go on without them."""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

LOG = logging.getLogger(__name__)
END_SECONDS = 60.0
"""How long a run waits at its end for what is still on its way to a server that has answered before."""
UNOPENED_SECONDS = 30.0
"""How long it waits for one that never has."""


class Channel:
    """Tells a writer what to write until it fails for the first time: a full disk, a broken connection.

    Args:
        name: what the warning calls it.
        open_writer: makes the writer; may fail like any later call.
    """

    def __init__(self, name: str, open_writer: Callable[[], Any]) -> None:
        self._name = name
        self._writer: Any = None
        self._failed = False
        self._attempt(lambda: setattr(self, "_writer", open_writer()))

    def use(self, action: Callable[[Any], object]) -> None:
        """Call ``action(writer)``; does nothing once the writer has failed."""
        self._attempt(lambda: action(self._writer))

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            # Whatever a third party's client raises, weeks of training are worth more than its figures.
            self._failed = True
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, problem: str) -> None:
        LOG.warning("dualtok: %s: %s; nothing more is written there, training goes on", self._name, problem)


class BackgroundChannel(Channel):
    """A channel with a thread of its own, for a server: its client may wait for minutes before it gives up.

    Arguments as for :class:`Channel`.
    """

    def __init__(self, name: str, open_writer: Callable[[], Any]) -> None:
        self._actions: SimpleQueue[Callable[[Any], object] | None] = SimpleQueue()
        self._thread = threading.Thread(
            target=self._work, args=(name, open_writer), name=f"dualtok-{name}", daemon=True
        )
        self._name, self._writer, self._failed = name, None, False
        self._thread.start()

    def use(self, action: Callable[[Any], object]) -> None:
        """Call ``action(writer)`` after what was asked for before, some time."""
        if not self._failed:
            self._actions.put(action)

    def end(self) -> None:
        """Wait a while for what is under way."""
        self._actions.put(None)
        seconds = UNOPENED_SECONDS if self._writer is None else END_SECONDS
        self._thread.join(seconds)
        if self._thread.is_alive() and not self._failed:
            self._failed = True
            self._warn(f"no answer, {seconds:.0f} s after the last step")

    def _work(self, name: str, open_writer: Callable[[], Any]) -> None:
        super().__init__(name, open_writer)
        while (action := self._actions.get()) is not None:
            super().use(action)
