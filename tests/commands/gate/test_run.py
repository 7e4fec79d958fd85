"""The gate as a command: its exit statuses, what it prints, and what it leaves in the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dualtok.audit.report.data import AuditFigures, Strongest
from dualtok.audit.report.write import load_report, write_report
from dualtok.commands.gate.run import find_report, parse_tpr
from dualtok.errors import ConfigError, DataError
from tests.audit.report.small import canaries, estimate, report, row
from tests.support import dualtok, error_line

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output_dir with an audit and its report: ``dual`` has .55 [.5, .58], ``plain`` .9 [.85, .95]."""
    plain = row("plain", strongest=Strongest(label="Ref", auc_two_sided=estimate(0.9, 0.85, 0.95)))
    made = report(row("dual", canaries=canaries(extracted=estimate(0, 0, 0.03))), plain)
    write_report(made, tmp_path / "report")
    (tmp_path / "audit").mkdir()
    figures = AuditFigures(settings=made.settings, models=made.rows, checks=made.checks)
    (tmp_path / "audit" / "audit.json").write_text(figures.model_dump_json())
    return tmp_path


@pytest.mark.parametrize(
    ("options", "status", "line"),
    [
        (["--max-strongest-auc", ".95"], 0, "gate passed: 2 figures of 2 models, none above its limit"),
        (["--model", "dual", "--max-strongest-auc", ".58", "--max-tpr", ".05@.01"], 0, "gate passed: 2 figures of 1"),
        (["--max-strongest-auc", ".58"], 1, "1 of 2 figures above the limit: plain: strongest AUC .95 > .58"),
        (["--max-strongest-auc", ".9", "--compare", "value"], 0, "compared: the figure itself"),
        (["--model", "dual", "--max-extraction", "0", "--max-tpr", ".05@.01", "--max-tpr", ".5@.001"], 2, "fewer than"),
        (["--max-extraction", "0"], 2, "plain: extraction (not measured"),
    ],
)
def test_the_exit_status_says_what_the_last_line_does(folder: Path, options: list[str], status: int, line: str) -> None:
    ended = dualtok("gate", folder / "report" / "report.json", *options)
    assert ended.returncode == status, ended.stderr
    assert line in ended.stdout.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_the_verdict_is_written_into_the_report_and_a_second_call_changes_nothing(folder: Path) -> None:
    options = ["--max-strongest-auc", ".58", "--max-extraction", "0"]
    files = sorted((folder / "report").iterdir())
    before = load_report(folder / "report" / "report.json")
    assert before.gate is None
    unwritten = {file: file.read_bytes() for file in files}
    assert dualtok("gate", folder, *options, "--no-write").returncode == 1
    assert {file: file.read_bytes() for file in files} == unwritten
    assert dualtok("gate", folder, *options).returncode == 1
    written = {file: file.read_bytes() for file in files}
    after = load_report(folder / "report" / "report.json")
    assert after.gate is not None
    assert after.model_copy(update={"gate": None}) == before
    assert [(check.model, check.figure, check.limit, check.verdict) for check in after.gate.checks] == [
        ("dual", "strongest AUC", 0.58, "passed"),
        ("dual", "extracted canaries", 0, "passed"),
        ("plain", "strongest AUC", 0.58, "above"),
        ("plain", "extraction", 0, "cannot be said"),
    ]
    assert "Gate not passed" in (folder / "report" / "report.html").read_text()
    assert dualtok("gate", folder, *options).returncode == 1
    assert {file: file.read_bytes() for file in files} == written
    assert sorted((folder / "report").iterdir()) == files
    assert dualtok("gate", folder, "--max-strongest-auc", "1").returncode == 0
    changed = load_report(folder / "report" / "report.json").gate
    assert changed is not None
    assert [check.limit for check in changed.checks] == [1, 1], "the last call counts"


def test_a_report_is_found_from_each_place_that_names_it(folder: Path) -> None:
    path = folder / "report" / "report.json"
    for place in (path, path.parent, folder, folder / "audit", folder / "audit" / "audit.json"):
        assert find_report(place).resolve() == path
    with pytest.raises(DataError, match=r"elsewhere: no report\.json there; run `dualtok report`"):
        find_report(folder / "elsewhere")


@pytest.mark.parametrize("place", ["", "audit", "audit/audit.json"])
def test_a_report_of_other_figures_is_not_judged_for_those_of_the_audit(folder: Path, place: str) -> None:
    file = folder / "audit" / "audit.json"
    figures = AuditFigures.model_validate_json(file.read_bytes())
    file.write_text(figures.model_copy(update={"models": figures.models[:1]}).model_dump_json())
    ended = dualtok("gate", folder / place, "--max-strongest-auc", "1")
    assert "made of other figures than" in error_line(ended)
    assert "run `dualtok report` again" in error_line(ended)
    assert dualtok("gate", folder / "report", "--max-strongest-auc", "1").returncode == 0, "the report alone is named"
    file.write_text("{")
    assert "audit.json: malformed" in error_line(dualtok("gate", folder, "--max-strongest-auc", "1"))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "give at least one limit"),
        (["--max-tpr", ".05"], "--max-tpr '.05'"),
        (["--max-strongest-auc", ".3"], "--max-strongest-auc 0.3"),
        (["--max-strongest-auc", ".6", "--model", "duel"], "did you mean 'dual'?"),
        (["--max-strongest-auc", ".6", "--compare", "upper"], "--compare 'upper'"),
    ],
)
def test_a_wrong_option_ends_with_status_2(folder: Path, options: list[str], word: str) -> None:
    ended = dualtok("gate", folder, *options)
    assert word in error_line(ended)
    assert ended.returncode == 2


def test_a_tpr_limit_is_two_numbers() -> None:
    found = parse_tpr(".05@.01")
    assert (found.limit, found.fpr) == (0.05, 0.01)
    for text in ("", "@", ".05", ".05@", "@.01", "a@.01", ".05@.01@.1"):
        with pytest.raises(ConfigError, match="give a limit and a false-positive rate"):
            parse_tpr(text)


def test_what_casts_doubt_on_the_report_is_shown_with_its_verdict(tmp_path: Path) -> None:
    made = report(row("base"), row("dual"))
    assert made.checks is not None
    checks = made.checks.model_copy(update={"warnings": ["3 % of the non-members are a member"]})
    settings = made.settings
    settings.models, settings.null_model = {"base": "b", "dual": "d"}, "base"
    write_report(made.model_copy(update={"checks": checks, "settings": settings}), tmp_path)
    shown = dualtok("gate", tmp_path, "--max-strongest-auc", ".58").stdout
    assert "warning: 3 % of the non-members are a member" in shown
    assert "not judged: base (the null model)" in shown
