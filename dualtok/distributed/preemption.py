"""The end of a job that its scheduler asks for: SIGTERM (or SIGUSR1) makes every rank stop after the same step."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PreemptionNotice:
    """Listens for the signals while it is entered; the loop asks for :attr:`received` after each step."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> PreemptionNotice:
        """Begin to listen."""
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Restore what the signals did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: Any) -> None:
        self.received = True
