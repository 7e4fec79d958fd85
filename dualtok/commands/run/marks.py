"""What is known of steps that were begun or done: with which settings, from what, and how long they took."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtok.config.data import SCHEDULING
from dualtok.config.describe.fields import all_settings, in_words
from dualtok.config.run import flat
from dualtok.errors import DataError
from dualtok.files import file_sha256, write_text
from dualtok.train.checkpoints.manifest import COMPLETE
from dualtok.train.checks import FREE_ON_RESUME

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dualtok.commands.run.step import Step

MARKS = "steps"
"""Folder of the marks within a run's ``output_dir``."""
WHOLE = 1 << 26
"""Bytes up to which a file is read whole; a larger one is told by its size and by :data:`SAMPLES` pieces of it."""
SAMPLES, PIECE = 64, 1 << 20
READ_BY = {
    "score": ("reference.model", "reference.folds", "reference.precision", "reference.splits", "data.dir", "data.mix"),
    "audit": ("audit.", "data.dir"),
    "report": ("audit.",),
    "interpolate": ("interpolate.", "data.dir"),
}
"""Verb -> the settings, or the beginnings of their keys, that its result depends on."""


@dataclass
class Mark:
    """What a step was made with."""

    settings: dict[str, Any]
    """Dotted key -> value, of the settings that the result depends on."""
    inputs: dict[str, str]
    """What else it depends on -> which one of them it was."""
    made: str
    """Which one of a step's results this is; another word after another training run."""
    finished: bool = False
    seconds: float = 0.0
    """What it took, all attempts together."""


@dataclass(frozen=True)
class State:
    """How far a step is."""

    mark: Mark
    """What it would be made with now; as it was made, if it is done or begun."""
    done: bool = False
    begun: bool = False
    stale: tuple[str, ...] = field(default_factory=tuple)
    """Why an earlier result does not count."""


class Marks:
    """The marks of a way."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / MARKS

    def read(self, step: Step) -> Mark | None:
        """Return a step's mark, or None if it was never begun.

        Raises:
            DataError: the file is malformed.
        """
        path = self._path(step)
        try:
            return Mark(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            raise DataError(
                f"{path}: malformed; remove it, and the step {step.name!r} is checked or done again"
            ) from None

    def write(self, step: Step, mark: Mark) -> None:
        """Keep a step's mark."""
        write_text(self._path(step), json.dumps(asdict(mark), indent=1, ensure_ascii=False))

    def forget(self, step: Step) -> None:
        """Remove a step's mark."""
        self._path(step).unlink(missing_ok=True)

    def state(self, step: Step, made: Mapping[str, str | None]) -> State:
        """Return how far a step is.

        Args:
            step: the step.
            made: of each step that it needs, which result there is or will be; None where that is not known yet.
        """
        inputs = {name: found for name in step.needs if (found := made.get(name)) is not None}
        inputs |= {path: content(path) for path in step.contents}
        settings = settings_of(step)
        now = Mark(settings, inputs, made=_made(step, settings, inputs))
        earlier = self.read(step)
        if earlier is None or (earlier.finished and step.product is not None and not step.product.exists()):
            return State(now)
        reasons = tuple(_differences(earlier, now))
        if reasons and step.is_training and not any((step.product or Path()).glob(f"*/{COMPLETE}")):
            return State(now)  # it failed before there was anything to lose
        if reasons:
            return State(now, begun=True, stale=reasons)
        return State(earlier, done=earlier.finished, begun=True)

    def _path(self, step: Step) -> Path:
        return self._folder / f"{step.name}.json"


def settings_of(step: Step) -> dict[str, Any]:
    """Return the settings that a step's result depends on, by their dotted keys."""
    values: dict[str, Any] = json.loads(json.dumps(flat(step.run.as_dict())))
    if step.verb == "train":
        return {key: value for key, value in values.items() if not key.startswith(FREE_ON_RESUME)}
    if step.verb == "prepare":
        idle = tuple(f"data.{name}" for name in (*SCHEDULING, "dir"))
        return {key: value for key, value in values.items() if key.startswith("data.") and not key.startswith(idle)}
    if step.verb == "export":
        return {"options": " ".join(step.options)}
    return {key: value for key, value in values.items() if key.startswith(READ_BY[step.verb])}


def made_by(step: Step, mark: Mark) -> str:
    """Return which one of its results a finished step has made: that of prepared data is in its manifest."""
    if step.verb == "prepare" and step.product is not None:
        return file_sha256(step.product)
    return mark.made


def content(path: str) -> str:
    """Return a digest of a file or folder: of the whole of small files, of size and samples of large ones.

    What is no local file, such as the name of a model on a hub, is its own digest.
    """
    root = Path(path)
    if not root.exists():
        return path
    files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode())
        for piece in _pieces(file):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE:
            yield stream.read()
            return
        for number in range(SAMPLES):
            stream.seek((size - PIECE) * number // (SAMPLES - 1))
            yield stream.read(PIECE)


def _made(step: Step, settings: dict[str, Any], inputs: dict[str, str]) -> str:
    """Return a word for the result: by chance for training, which gives another one each time."""
    if step.is_training:
        return secrets.token_hex(8)
    text = json.dumps([step.name, settings, inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _differences(earlier: Mark, now: Mark) -> Iterator[str]:
    for key in sorted(earlier.settings.keys() | now.settings.keys()):
        before, value = earlier.settings.get(key), now.settings.get(key)
        if before != value and not (key not in earlier.settings and _is_default(key, value)):
            yield f"{key} was {_short(before)}, now {_short(value)}"
    for name in sorted(earlier.inputs.keys() & now.inputs.keys()):
        if earlier.inputs[name] != now.inputs[name]:
            yield f"{name} is another one now"


def _is_default(key: str, value: object) -> bool:
    """Return whether a setting that a mark does not know, as it may be younger than it, is as if it were not there."""
    setting = all_settings().get(key)
    return setting is not None and setting.section is None and setting.default == in_words(value)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def is_expensive(step: Step) -> bool:
    """Return whether a step's earlier result must not be given up without being asked."""
    return step.verb in ("train", "prepare")
