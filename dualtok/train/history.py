"""The history of a run: one line of JSON per step or evaluation, read without torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dualtok.files import write_text

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step measured, over all ranks and micro-batches."""

    step: int
    left_out: str | None
    """``nan`` or ``spike`` if the step was a bad one and changed nothing, else None."""
    loss: float
    """The objective's loss, averaged over micro-batches."""
    hard_loss: float
    """Mean token loss over T_h, nats."""
    memorized_loss: float
    """Mean token loss over T_m, nats; NaN when T_m is empty."""
    plain_loss: float
    """Mean token loss over all predicted tokens, nats."""
    hard_tokens: int
    memorized_tokens: int
    tokens: int
    """Predicted tokens."""
    skipped_blocks: int
    """Blocks of bad shards, which were empty; see ``data.on_bad_shard``."""
    gradient_norm: float
    """Norm of the global gradient before clipping."""
    learning_rate: float
    """Learning rate of this step."""
    tokens_per_second: float
    peak_memory_gib: float
    """Largest memory in use on rank 0: of the accelerator, or resident in the host where there is none."""

    @property
    def shares(self) -> dict[str, float]:
        """Shares of hard, memorized and neutral tokens."""
        hard, memorized = self.hard_tokens / max(self.tokens, 1), self.memorized_tokens / max(self.tokens, 1)
        return {"hard": hard, "memorized": memorized, "neutral": 1.0 - hard - memorized}


class History:
    """One JSON object per line, one line per step; rank 0 alone writes.

    Args:
        path: the file; None keeps nothing.
        resumed_at: steps done before; later lines, of steps that will be repeated, are dropped.
    """

    def __init__(self, path: Path | None, resumed_at: int = 0) -> None:
        self._path = path
        self.forget_after(resumed_at)

    def forget_after(self, step: int) -> None:
        """Drop the lines of later steps, which will be repeated."""
        if self._path is not None:
            kept = [line for line in read_history(self._path) if line["step"] <= step]
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, entry: Any) -> None:
        """Append a dataclass instance or dictionary with a ``step``."""
        if self._path is not None:
            values = entry if isinstance(entry, dict) else asdict(entry)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read a history; an unfinished last line, left by a crash, is dropped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [_with_new_names(json.loads(line)) for line in lines[:-1] if line]


def _with_new_names(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a line from before 0.2 with the present names of its figures."""
    names = {key: key.replace("memorised", "memorized").replace("optimiser", "optimizer") for key in entry}
    ranks = [_with_new_names(rank) for rank in entry.get("ranks", ())]
    return {names[key]: ranks if key == "ranks" else value for key, value in entry.items()}
