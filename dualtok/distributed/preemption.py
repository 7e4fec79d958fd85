"""The end of a job that its scheduler asks for: SIGTERM (or SIGUSR1) makes every rank stop after the same step."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PreemptionNotice:
    """Listens for the signals from :meth:`listen` until it is left; the loop asks for :attr:`received` after each step.

    It is left when the job's record is written. A rank that fails would otherwise be killed on the way there by the
    launcher, which ends the others as soon as one of them has gone, and would not have said why it ended.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> PreemptionNotice:
        """Restore the signals at the end; they end the process until :meth:`listen` is called."""
        return self

    def listen(self) -> None:
        """Take note of the signals from now on."""
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Restore what the signals did before."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, _number: int, _frame: Any) -> None:
        self.received = True
