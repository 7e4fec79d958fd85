"""One step of a way: a single command of dualtok, what it reads, and what there is when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dualtok.commands.output import AUDIT_FILE, audit_folder
from dualtok.config.load import parse_with_overrides
from dualtok.data.manifest import MANIFEST

if TYPE_CHECKING:
    from dualtok.config.run import RunConfig

SHARED = ("train", "score", "audit", "interpolate")
"""Verbs whose work ranks can share; the others are one process each."""


@dataclass(frozen=True)
class Step:
    """A command that is run once, when all that it needs is done."""

    name: str
    """Unique on its way; of its mark and its log."""
    title: str
    """What it does, for people."""
    verb: str
    run_file: Path
    run: RunConfig
    """The settings that it is run with: those of the file with all overrides."""
    overrides: tuple[str, ...] = ()
    """``section.key=value``: those of the command line, then its own."""
    positional: tuple[str, ...] = ()
    """Arguments of the verb in front of the overrides, but for the run file."""
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    """Names of the steps whose results it reads."""
    contents: tuple[str, ...] = ()
    """Files and folders that it reads and that no step makes."""
    product: Path | None = None
    """What is there when it is done; None: its mark alone says so."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows ``dualtok`` on the command line."""
        if self.verb == "export":
            return ("export", *self.positional, *self.options)
        return (self.verb, str(self.run_file), *self.positional, *self.overrides, *self.options)

    @property
    def is_training(self) -> bool:
        """Whether its result is another one each time, and may have taken days."""
        return self.verb == "train"


@dataclass(frozen=True)
class Source:
    """A run file, as a way starts from it."""

    run_file: Path
    run: RunConfig
    """Its settings, overrides of the command line applied."""
    given: tuple[str, ...] = ()
    """The overrides of the command line."""

    def step(self, name: str, title: str, verb: str, changes: dict[str, Any] | None = None, **others: Any) -> Step:
        """Return a step with some settings changed, and check these.

        Raises:
            ConfigError: the settings do not go together.
        """
        overrides = tuple(override(key, value) for key, value in (changes or {}).items())
        run = parse_with_overrides(self.run.as_dict(), overrides, source=f"{self.run_file} (step {name!r})")
        if verb == "train":
            others = {"options": ("--auto-resume",), **others}
        return Step(name, title, verb, self.run_file, run, overrides=(*self.given, *overrides), **others)


def override(key: str, value: Any) -> str:
    """Return a setting as an argument of the command line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"


def prepared(run: RunConfig) -> Path:
    """Return the file that is there when a run's data is prepared."""
    return Path(run.data.dir) / MANIFEST


def audited(output_dir: Path) -> Path:
    """Return the file that is there when an audit is done."""
    return audit_folder(output_dir) / AUDIT_FILE
