"""What one check found, and how all of them are shown."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dualtok.config.run import RunConfig

Status = Literal["ok", "warn", "fail", "not-run"]


@dataclass(frozen=True)
class CheckResult:
    """One line of the table."""

    name: str
    status: Status
    """``fail``: a run would stop, hang or learn something wrong; ``warn``: it would run, but slower or less safely;
    ``not-run``: could not be checked."""
    found: str
    """What was measured or seen; for ``not-run`` why it could not be."""
    remedy: str = ""
    """What to do; never empty for ``fail`` and ``warn``."""
    host: str = ""
    """The host that it concerns, if several are examined."""

    def __post_init__(self) -> None:
        """Hold every failed line to its remedy."""
        assert self.remedy or self.status in ("ok", "not-run"), f"{self.name}: {self.status} without a remedy"


@dataclass(frozen=True)
class Subject:
    """What is examined."""

    folder: Path
    """Where runs write: the run's ``output_dir``."""
    run: RunConfig | None = None
    """The run that is to start, if one is named."""
    quick: bool = False
    """Leave out what takes more than a few seconds."""


def judged(name: str, problems: Sequence[str], found: str, remedy: str, *, bad: Status = "fail") -> CheckResult:
    """Return ``bad`` with the problems if there are any, else ``ok`` with what was found."""
    if problems:
        return CheckResult(name, bad, "; ".join(problems), remedy)
    return CheckResult(name, "ok", found)


def any_failed(results: Sequence[CheckResult]) -> bool:
    """Return whether a check failed."""
    return any(result.status == "fail" for result in results)


def as_json(results: Sequence[CheckResult]) -> str:
    """Return ``{"failed": bool, "checks": [...]}``."""
    checks: list[dict[str, Any]] = [asdict(result) for result in results]
    return json.dumps({"failed": any_failed(results), "checks": checks}, indent=1)


def print_table(results: Sequence[CheckResult]) -> None:
    """Print one line per check, the remedy below what it is for, and the count of each status."""
    colours: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red", "not-run": "dim"}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    several = any(result.host for result in results)
    for column in (*(("host",) if several else ()), "check", "status"):
        table.add_column(column, no_wrap=True)
    table.add_column("found", overflow="fold")
    for result in results:
        text = Text(result.found)
        if result.remedy:
            text.append(f"\n-> {result.remedy}", style="bold")
        host = (result.host,) if several else ()
        table.add_row(*host, result.name, Text(result.status, style=colours[result.status]), text)
    console = Console(highlight=False)
    console.print(table)
    counts = Counter(result.status for result in results)
    console.print(", ".join(f"{counts[status]} {status}" for status in colours if counts[status]))
