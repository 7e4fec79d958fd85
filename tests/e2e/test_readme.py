"""The quickstart is run as it stands, by a new user with a folder and a corpus; and what the README says holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from dualtok.data.sources.corpora import sotu_passages, write_jsonl
from tests import warm
from tests.support import ROOT, environment

README, QUICKSTART, DEVELOPMENT = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/quickstart.md", "docs/development.md")
)


def quickstart(page: str) -> list[str]:
    """Return the commands of a page's quickstart."""
    (script,) = re.findall(r"<!-- quickstart -->\n```bash\n(.*?)```", page, re.DOTALL)
    lines: list[str] = script.splitlines()
    return lines


def test_the_quickstart_is_three_commands_and_the_same_everywhere() -> None:
    assert quickstart(README) == quickstart(QUICKSTART)
    install, *others = quickstart(README)
    assert install == "pip install -c constraints.txt -e ."
    assert len(others) == 2


@pytest.mark.slow
def test_the_quickstart_works_as_it_is_written(tmp_path: Path) -> None:
    """But for its first line: what it installs is what these tests run with."""
    write_jsonl(islice(sotu_passages(), 250), tmp_path / "corpus.jsonl")
    script = "\n".join(quickstart(QUICKSTART)[1:])
    done = subprocess.run(
        ["bash", "-euxc", script],
        cwd=tmp_path,
        env=environment(PATH=f"{warm.programs()}:{os.environ['PATH']}"),
        stdin=subprocess.DEVNULL,
        text=True,
        capture_output=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "runs" / "dual" / "report" / "report.html").read_text()
    for model in ("reference alone", "plain", "dual"):
        assert model in page


def test_the_installed_command_starts(tmp_path: Path) -> None:
    """The quickstart above forks what it starts; this is the program that pip installs."""
    program = Path(sys.executable).with_name("dualtok")
    shown = subprocess.run(
        [program, "--help"], cwd=tmp_path, env=environment(), text=True, capture_output=True, timeout=120, check=True
    ).stdout
    assert "prepare" in shown
    assert "audit" in shown


def test_the_library_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(example, {})
    assert "SelectionCounts(tokens=512, hard=307" in capsys.readouterr().out


def test_every_command_of_the_command_line_is_in_the_readme() -> None:
    from dualtok.cli import app

    for command in (command for command in app.registered_commands if not command.hidden):  # hidden: old names
        assert command.callback is not None
        assert f"`dualtok {command.callback.__name__}" in README


def test_every_make_target_that_the_docs_name_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name in re.findall(r"`make ([a-z-]+)`", README + DEVELOPMENT):
        assert name in targets


def test_the_readme_can_be_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 130
