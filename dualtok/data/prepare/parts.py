"""A share of the source for each of several processes, on one host or many (``dualtok prepare --part i/n``), and what
it leaves in its own folder below the staging folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from dualtok.data.sources.documents import Document, read_some, read_unit, source_files, units
from dualtok.errors import ConfigError, DataError
from dualtok.files import lock_holder, locked, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dualtok.config.data import DataConfig

BEGUN, COMPLETE, LOCK = "part.json", "complete.json", "lock"
READING = (
    "source",
    "field",
    "group_field",
    "rows",
    "train_on",
    "txt_documents",
    "dataset_config",
    "dataset_split",
    "max_documents",
    "near_duplicate_threshold",
    "shingle_words",
    "permutations",
)
"""Settings that decide what a part stages. The others belong to ``--finish`` alone."""


class Part(NamedTuple):
    """Part ``number`` (from 1) of ``of``."""

    number: int
    of: int

    def __str__(self) -> str:
        """Return it as the command line takes it."""
        return f"{self.number}/{self.of}"

    def folder(self, staging: Path) -> Path:
        """Return where this part is staged."""
        return staging / f"part-{self.number:05d}-of-{self.of:05d}"


ALONE = Part(1, 1)


def parse_part(text: str) -> Part:
    """Return the part that ``i/n`` names.

    Raises:
        ConfigError: it is not of this form, or not 1 <= i <= n.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--part {text}: must be i/n with 1 <= i <= n, e.g. 2/8")
    return Part(int(match[1]), int(match[2]))


def parts_in(staging: Path) -> list[Part]:
    """Return the parts that were begun."""
    matches = (re.fullmatch(r"part-(\d+)-of-(\d+)", path.name) for path in sorted(staging.glob("part-*")))
    return [Part(int(match[1]), int(match[2])) for match in matches if match is not None]


class PartReader:
    """The documents of one part, in their order in the source.

    A part takes every n-th file where there are n files or more, else every n-th row group where a Parquet source has
    so many, else every n-th document; with ``max_documents``, and alone, always documents.
    """

    def __init__(self, config: DataConfig, part: Part) -> None:
        self._config, self._part = config, part
        divisible = part.of > 1 and config.max_documents is None
        self._units = units(config, part.of) if divisible else None
        self.counts: dict[int, int] | None = None if self._units is None else {}
        """Documents of each unit read so far; None when the source is divided by documents."""

    @property
    def unit_count(self) -> int | None:
        """How many pieces the source was cut into; None when it is divided by documents."""
        return None if self._units is None else len(self._units)

    def listing(self) -> str:
        """Return a digest of the source's file names and how they are divided: the same for all parts.

        Not of the contents: a line may be fixed after an error, and what was read is compared by its own digest.
        """
        names = [str(path) for path in source_files(self._config) or []]
        return hashlib.sha256(json.dumps([names, self.unit_count]).encode()).hexdigest()

    def __iter__(self) -> Iterator[Document]:
        """Yield the part's documents."""
        index, of = self._part.number - 1, self._part.of
        if self._units is None or self.counts is None:
            documents = read_some(self._config, lambda number: number % of == index)
            yield from (document for document in islice(documents, self._config.max_documents) if document is not None)
            return
        for unit in range(index, len(self._units), of):
            self.counts[unit] = 0
            for document in read_unit(self._units[unit], self._config):
                self.counts[unit] += 1
                yield document


def begin_part(config: DataConfig, part: Part, staging: Path, settings: dict[str, Any], listing: str) -> None:
    """Note what a part is made of, or refuse to go on with one that was made of something else.

    Raises:
        ConfigError: other settings than this part's earlier start, or another part's.
        DataError: the source's files are others than then, or parts of another number are there.
    """
    folder = part.folder(staging)
    for other in parts_in(staging):
        if other.of != part.of:
            what = "was begun as one process" if other.of == 1 else f"holds parts of {other.of}"
            raise DataError(
                f"{staging}: {what}, so part {part} does not fit; go on as it was begun, or remove the folder"
            )
        if (other.folder(staging) / BEGUN).is_file():
            note = require_same_part(other, settings, staging)
            if note["listing"] != listing:
                raise DataError(
                    f"{config.source}: part {part} sees other files than part {other} did at its start; fix the "
                    f"source, or remove {staging} and begin again"
                )
    write_text(folder / BEGUN, json.dumps({"settings": reading_settings(settings), "listing": listing}, indent=1))


def reading_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return those of the data section's settings that decide what a part stages."""
    return {key: settings[key] for key in READING}


def require_same_part(part: Part, settings: dict[str, Any], staging: Path) -> dict[str, Any]:
    """Return what a part noted at its start; refuse settings that differ from its own.

    Raises:
        ConfigError: names the first setting that differs.
    """
    note: dict[str, Any] = json.loads((part.folder(staging) / BEGUN).read_text(encoding="utf-8"))
    for key in READING:
        if note["settings"].get(key) != settings[key]:
            raise ConfigError(
                f"data.{key}: {settings[key]!r}, but part {part} in {staging} was begun with "
                f"{note['settings'].get(key)!r}; use the same settings for all parts, or remove the folder"
            )
    return note


def check_parts(staging: Path, settings: dict[str, Any]) -> int:
    """Return the number of parts if all are there, complete, and fit each other.

    Raises:
        DataError: names the parts that are missing, interrupted or still running.
        ConfigError: a part was made with other settings.
    """
    found = parts_in(staging)
    numbers = sorted({part.of for part in found})
    if not found:
        raise DataError(f"{staging}: no part is there; run `dualtok prepare --part 1/n` to n/n first")
    if len(numbers) > 1:
        raise DataError(
            f"{staging}: parts of {' and of '.join(map(str, numbers))} side by side; remove those that do not belong"
        )
    problems, listings = [], set()
    for part in (Part(number, numbers[0]) for number in range(1, numbers[0] + 1)):
        folder = part.folder(staging)
        if not (folder / COMPLETE).is_file():
            problems.append(f"{part} {_state(folder)}")
            continue
        listings.add(require_same_part(part, settings, staging)["listing"])
    if problems:
        raise DataError(
            f"{staging}: not all of {numbers[0]} parts are complete: {', '.join(problems)}; run "
            "`dualtok prepare --part` for them first"
        )
    if len(listings) > 1:
        raise DataError(f"{staging}: the parts saw different files in data.source; remove the folder and begin again")
    return numbers[0]


def _state(folder: Path) -> str:
    if not folder.is_dir():
        return "is missing"
    path = folder / LOCK
    try:
        with FileLock(path, blocking=False, fallback_to_soft=False):
            return "was interrupted"
    except Timeout:
        return f"is still running ({lock_holder(path)})"
    except OSError:  # a file system without locks
        return "is not complete"


@contextmanager
def claimed(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes from the same work, on any host that shares the folder and its locks, until this one ends.

    On a file system without locks it goes on unguarded, as results are whole files either way.

    Raises:
        DataError: another process has it.
    """

    def refuse(holder: str) -> None:
        raise DataError(f"{folder}: {what} is still running ({holder}); wait for it or stop it") from None

    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, f"{socket.gethostname()}, process {os.getpid()}", refuse):
        yield
