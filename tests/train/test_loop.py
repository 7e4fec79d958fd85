"""The loop's own promises, where no engine is needed to see them; real runs are in tests/multi_rank and beside this."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dualtok.distributed.preemption import PreemptionNotice
from dualtok.monitor.timing import PhaseTimer
from dualtok.train import loop as loop_module
from dualtok.train.loop import LoopState, TrainingLoop
from dualtok.train.reporter import Callback, Reporter

if TYPE_CHECKING:
    import pytest


def test_a_signal_to_end_interrupts_neither_the_last_checkpoint_nor_what_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    caught: list[str] = []

    def note(when: str) -> None:
        assert signal.getsignal(signal.SIGTERM) is not before, when
        caught.append(when)

    class Closing(Callback):
        def close(self) -> None:
            note("closed")

    def opened(*_: Any, **__: Any) -> Reporter:
        note("opened")
        return Reporter([Closing()])

    monkeypatch.setattr(loop_module, "open_reporter", opened)
    loop: Any = object.__new__(TrainingLoop)
    loop.run = loop.folder = loop.ranks = loop.watch = loop.watchdog = loop.efficiency = loop.reference = None
    loop.notice, loop.state, loop.total_steps = PreemptionNotice(), LoopState(step=4), 4
    loop.engine = SimpleNamespace(timer=PhaseTimer())
    loop.writer = SimpleNamespace(wait=lambda: note("last checkpoint"))
    loop.batches = lambda: iter(())
    with loop.notice:
        assert signal.getsignal(signal.SIGTERM) is before, "it does not listen yet"
        assert loop.fit().step == 4
        note("what follows the loop, until the job's record is written")
    assert caught[:3] == ["opened", "last checkpoint", "closed"]
    assert signal.getsignal(signal.SIGTERM) is before
