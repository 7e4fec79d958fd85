"""`dualtok settings`, the sections in each verb's help, and what a shell completes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from dualtok.cli import app
from dualtok.commands.settings.command import complete_section, complete_setting
from dualtok.commands.settings.reference import reference
from dualtok.commands.settings.sections import READS
from dualtok.config.describe.fields import all_settings
from dualtok.errors import ConfigError
from tests.support import ROOT, command, dualtok, environment, error_line, succeed

if TYPE_CHECKING:
    from pathlib import Path


def plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def test_a_section_is_described_with_all_its_settings() -> None:
    text = plain(reference("train"))
    for key in (key for key in all_settings() if key.startswith("train.")):
        assert key in text
    assert "integer at least 1 · required · unit: blocks" in text
    assert "Refused: train: give exactly one of 'steps' and 'epochs'" in text


def test_one_setting_is_described_alone() -> None:
    text = plain(reference("train.guard.spike_factor"))
    assert text.startswith(
        "train.guard.spike_factor number above 1, or null · default: none · no unit A step is a spike"
    )
    assert "patience" not in text


def test_without_a_name_all_sections_are_listed() -> None:
    text = plain(reference(None))
    assert "output_dir text · default: `runs/default`" in text
    for section in ("workflow", "data", "launch"):
        assert f" {section} " in text


def test_a_typo_is_told_with_the_nearest_name() -> None:
    assert "did you mean 'train.steps'" in error_line(dualtok("settings", "train.step"))
    with pytest.raises(ConfigError, match="no section or setting is called 'nothing'"):
        reference("nothing")


@pytest.mark.parametrize("verb", READS)
def test_the_help_of_a_verb_names_the_sections_that_it_reads(verb: str) -> None:
    shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert f"Reads the sections {', '.join(READS[verb])}" in " ".join(re.sub(r"[│\s]+", " ", shown.output).split())


def test_a_verb_names_every_section_that_it_cannot_do_without() -> None:
    for path in (ROOT / "dualtok" / "commands").rglob("*.py"):
        for section, verb in re.findall(r'\.need\("(\w+)", "(\w+)"\)', path.read_text(encoding="utf-8")):
            if verb in READS:
                assert section in READS[verb], path


def test_settings_and_sections_are_completed() -> None:
    assert "train.learning_rate=" in complete_setting("train.le")
    assert "train.guard=" not in complete_setting("train.")
    assert complete_setting("train.learning_rate=1") == []
    assert "train.guard" in complete_section("train.g")


def test_a_shell_completes_verbs_and_settings(tmp_path: Path) -> None:
    import subprocess

    def completed(words: str) -> list[str]:
        variables = environment(_DUALTOK_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
        program = command("dualtok", afresh=True)
        script = "import sys; sys.argv[0] = 'dualtok'; from dualtok.cli import app; app(prog_name='dualtok')"
        done = subprocess.run(
            [program[0], "-c", script], env=variables, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout.split()

    assert completed("dualtok sett") == ["settings"]
    assert "train.warmup_steps=" in completed("dualtok train run.yaml train.wa")
    shown = succeed(dualtok("--help"))
    assert "--install-completion" in shown
