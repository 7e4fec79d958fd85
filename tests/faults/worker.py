"""``dualtok`` with a fault of a test's choosing: ``python -m tests.faults.worker train RUN.yaml --auto-resume``.

``DUALTOK_FAULT`` describes it as JSON (:class:`Fault`); it strikes once per job. Beside it every rank notes which
blocks it trained on, by the CRC-32 of their tokens.
"""

from __future__ import annotations

import json
import os
import signal
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import dualtok.commands.train as train_module
import dualtok.train.checkpoints.writer as checkpoint_module
from dualtok.cli import main as dualtok_main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Kind = Literal["kill", "sigterm", "disk_full", "hang", "nan"]
Moment = Literal["step", "save", "finalize"]
FAULT, SAMPLES = "DUALTOK_FAULT", "DUALTOK_SAMPLES"


@dataclass(frozen=True)
class Fault:
    """What happens, where and when."""

    kind: Kind
    rank: int
    step: int
    """The step that is about to be taken, or whose checkpoint is being written."""
    moment: Moment = "step"
    mark: str = ""
    """File that is written when the fault strikes; it holds the time."""
    ballast: str = ""
    """File on the run's own small disk that ``disk_full`` lets grow until there is no room."""

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    def strike(self) -> None:
        Path(self.mark).write_text(repr(time.time()))
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.kind == "hang":
            time.sleep(3600)
        elif self.kind == "disk_full":
            try:
                with Path(self.ballast).open("wb", buffering=0) as stream:
                    while True:
                        stream.write(bytes(4096))
            except OSError:
                pass


class Injector:
    """Stands between the loop and its engine."""

    def __init__(self, fault: Fault | None, samples: Path, rank: int) -> None:
        mine = fault is not None and fault.rank == rank and not Path(fault.mark).exists()
        self.fault = fault if mine else None
        self.samples = samples / f"rank-{rank}.jsonl"
        self.writing = 0

    def due(self, moment: Moment, step: int) -> bool:
        return self.fault is not None and (self.fault.moment, self.fault.step) == (moment, step)

    def strike(self) -> None:
        fault, self.fault = self.fault, None
        assert fault is not None
        fault.strike()

    def around_step(self, engine: Any) -> None:
        train_step = engine.train_step

        def step_with_fault(window: Any) -> Any:
            step = engine.engine.global_steps + 1
            if self.due("step", step):
                self.strike()
            rows = [zlib.crc32(row.numpy().tobytes()) for batch in window for row in batch["input_ids"].cpu()]
            with self.samples.open("a") as stream:
                stream.write(json.dumps({"step": step, "rows": rows}) + "\n")
            return train_step(window)

        engine.train_step = step_with_fault

    def install(self) -> None:
        write_part, finalize = checkpoint_module.write_part, checkpoint_module.finalize

        def with_fault(build: Callable[..., Any]) -> Callable[..., Any]:
            def build_with_fault(*arguments: Any, **settings: Any) -> Any:
                engine = build(*arguments, **settings)
                self.around_step(engine)
                return engine

            return build_with_fault

        def write_with_fault(folder: Path, rank: int, pieces: Iterable[Any]) -> None:
            step = int(folder.name.removeprefix("step-"))

            def struck() -> Iterator[Any]:
                for number, piece in enumerate(pieces):
                    yield piece
                    if number == 3 and self.due("save", step):
                        self.strike()

            write_part(folder, rank, struck())

        def seal_with_fault(folder: Path, **facts: Any) -> None:
            if self.due("finalize", facts["step"]):
                self.strike()
            finalize(folder, **facts)

        train_module.build_engine = with_fault(train_module.build_engine)
        checkpoint_module.write_part = write_with_fault  # type: ignore[assignment]
        checkpoint_module.finalize = seal_with_fault  # type: ignore[assignment]
        # A file for every few pieces, so that a fault can strike between two of them.
        import dualtok.train.checkpoints.files as files_module

        files_module.FILE_BYTES = 1 << 12


def main() -> None:
    described = os.environ.get(FAULT)
    fault = Fault(**json.loads(described)) if described else None
    Injector(fault, Path(os.environ[SAMPLES]), int(os.environ.get("RANK", "0"))).install()
    dualtok_main()


if __name__ == "__main__":
    main()
