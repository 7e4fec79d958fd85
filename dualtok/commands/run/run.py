"""Run the steps of a way, each once: those that are done are kept, and a result of other settings is not mixed in."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dualtok.commands.run.display import Display
from dualtok.commands.run.estimate import seconds_left
from dualtok.commands.run.marks import Marks, State, is_expensive, made_by
from dualtok.commands.run.start import run_step, shown
from dualtok.errors import PREEMPTED, ConfigError, DualtokError, Preempted
from dualtok.files import locked
from dualtok.launch.local import ended_by_sigterm

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dualtok.commands.run.step import Step

LOGS, REPLACED, LOCK = "logs", "replaced", ".run.lock"


@dataclass
class Way:
    """The steps of one run, in the folder that holds their marks and logs."""

    steps: Sequence[Step]
    folder: Path
    command: str
    """What starts it, for messages."""
    redo: bool = False
    """Whether training runs of other settings are put aside and made again."""
    made: dict[str, str | None] = field(default_factory=dict)
    """Step -> which result there is; None where that is not known yet."""
    taken: dict[str, float] = field(default_factory=dict)

    @property
    def marks(self) -> Marks:
        """Of the steps."""
        return Marks(self.folder)

    def carry_out(self) -> None:
        """Run every step that is not done.

        Raises:
            ConfigError: an earlier result was made with other settings and would be lost.
            DualtokError: a step failed; names its log and the next step.
            Preempted: a step was asked to end, and can go on.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / LOCK, f"process {os.getpid()} on {socket.gethostname()}", self._refuse_second):
            self._check_all()
            with ended_by_sigterm(), Display(len(self.steps)) as display:
                for number, step in enumerate(self.steps, start=1):
                    self._do(number, step, display)

    def print_commands(self) -> None:
        """Print the command of each step that is still to be done, and say which ones are done."""
        for number, (step, state) in enumerate(self._states(), start=1):
            print(f"# [{number}/{len(self.steps)}] {step.title}{_remark(state)}")
            print(f"# {shown(step)}" if state.done else shown(step))

    def _refuse_second(self, holder: str) -> None:
        raise ConfigError(f"{self.folder}: {holder} runs these steps already; wait for it, or give another output_dir")

    def _states(self) -> list[tuple[Step, State]]:
        """Return how far each step is, as far as this is known before any is run."""
        made: dict[str, str | None] = {}
        states = []
        for step in self.steps:
            state = self.marks.state(step, made)
            states.append((step, state))
            made[step.name] = state.mark.made
            if step.verb == "prepare":
                made[step.name] = made_by(step, state.mark) if state.done else None
        return states

    def _check_all(self) -> None:
        """Refuse before anything is run what :meth:`_do` would refuse later."""
        stale = [(step, state) for step, state in self._states() if state.stale and is_expensive(step)]
        for step, state in stale:
            self._refuse_prepared(step, state)
        if stale and not self.redo:
            raise ConfigError(self._told(stale))

    def _refuse_prepared(self, step: Step, state: State) -> None:
        if step.verb == "prepare":
            raise ConfigError(
                f"step {step.name!r}: {step.run.data.dir} was prepared otherwise: {'; '.join(state.stale)}; change "
                "that back, choose another data.dir, or remove the folder"
            )

    def _told(self, stale: Sequence[tuple[Step, State]]) -> str:
        steps = "; ".join(f"{step.name!r} ({_first(state.stale)})" for step, state in stale)
        return (
            f"{self.folder}: trained with other settings: {steps}. Change them back, give another output_dir, or train "
            f"again with `{self.command} --redo`, which keeps the earlier results in {self.folder / REPLACED}"
        )

    def _do(self, number: int, step: Step, display: Display) -> None:
        """Run a step if it is not done."""
        state = self.marks.state(step, self.made)
        if state.done:
            self.made[step.name] = made_by(step, state.mark)
            self.taken[step.name] = state.mark.seconds
            display.skip(number, step)
            return
        if state.stale:
            self._refuse_prepared(step, state)
            if is_expensive(step) and not self.redo:
                raise ConfigError(self._told([(step, state)]))
            display.line(f"  {step.name}: {'; '.join(state.stale)}: done again")
        if not state.begun or state.stale:
            self._clear(step)
        mark = state.mark
        self.marks.write(step, mark)
        display.begin(number, step, self._left(number))
        started = time.monotonic()
        log = self.folder / LOGS / f"{step.name}.log"
        error = ""

        def show(line: str | None) -> None:
            nonlocal error
            if line is not None and line.startswith("dualtok: error:"):
                error = line.removeprefix("dualtok: error:").strip()
            display.detail(step, line)

        status = run_step(step, log, show)
        seconds = mark.seconds + time.monotonic() - started
        self.marks.write(step, replace(mark, seconds=seconds, finished=status == 0))
        if status == PREEMPTED:
            raise Preempted(f"step {number} of {len(self.steps)} was asked to end; go on with `{self.command}`")
        if status:
            raise DualtokError(
                f"step {number} of {len(self.steps)} ({step.name}: {step.title}) failed: "
                f"{error or f'exit status {status}'}. Its log: {log}. When this is mended, `{self.command}` goes on at "
                "this step"
            )
        self.made[step.name] = made_by(step, mark)
        self.taken[step.name] = seconds

    def _left(self, number: int) -> float | None:
        return seconds_left(self.steps[number - 1 :], self.taken, self.steps[: number - 1])

    def _clear(self, step: Step) -> None:
        """Make room for a step's result: a training run is put aside, what can be made again at once is removed."""
        if step.product is None or step.verb == "prepare":
            return
        if step.is_training:
            _put_aside(step.product.parent, self.folder / REPLACED)
        elif step.verb in ("export", "interpolate"):
            shutil.rmtree(step.product, ignore_errors=True)


def _put_aside(folder: Path, replaced: Path) -> None:
    if not folder.exists():
        return
    number = 1 + len(list(replaced.glob(f"{folder.name}-*")))
    replaced.mkdir(parents=True, exist_ok=True)
    folder.rename(replaced / f"{folder.name}-{number}-{secrets.token_hex(2)}")


def _first(reasons: Sequence[str]) -> str:
    return reasons[0] if len(reasons) == 1 else f"{reasons[0]}, and {len(reasons) - 1} more"


def _remark(state: State) -> str:
    if state.done:
        return ": done"
    if state.stale:
        return f": made otherwise: {'; '.join(state.stale)}"
    return ": begun" if state.begun else ""
