"""``dualtok report``: the audit's figures and the runs' histories as one HTML page, JSON and CSV."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from dualtok.audit.report.data import AuditFigures, AuditReport, SelectionSeries, TrainingSeries
from dualtok.audit.report.write import write_report
from dualtok.commands.output import AUDIT_FILE, audit_folder
from dualtok.config.run import trained_objective
from dualtok.errors import DataError
from dualtok.objective.settings import NEEDS_REFERENCE
from dualtok.train.engines.dp_account import stated
from dualtok.train.history import read_history
from dualtok.versions import installed_versions

if TYPE_CHECKING:
    from dualtok.config.run import RunConfig

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy", "scikit-learn")
MOST_POINTS = 400


def write_run_report(run: RunConfig) -> Path:
    """Write ``report.html``, ``report.json`` and ``report.csv`` into ``<output_dir>/report`` and return the page.

    Raises:
        DataError: there is no audit yet, or a run of ``audit.runs`` has no history.
    """
    figures = read_figures(run.output_dir)
    histories = {name: _history(name, Path(folder)) for name, folder in run.audit.runs.items()}
    report = AuditReport(
        title="dualtok audit",
        created=datetime.now(UTC).astimezone().isoformat(timespec="seconds"),
        identity={
            **({} if figures.settings.of_texts else {"data": run.data.dir}),
            "members": figures.settings.sides_in_words[0],
            "non-members": figures.settings.sides_in_words[1],
            "attacker's reference": ", ".join(figures.settings.references.values()) or "none",
            **{f"privacy of {name}": told for name, folder in run.audit.runs.items() if (told := stated(Path(folder)))},
            **{
                f"left out of {split}": f"{len(documents)}, which attacks put in front of others"
                for split, documents in figures.prefix_documents.items()
            },
        },
        settings=figures.settings,
        rows=figures.models,
        checks=figures.checks,
        references=figures.references,
        selection=[
            s for name, folder in run.audit.runs.items() if (s := _selection(name, Path(folder), histories[name]))
        ],
        training=[s for name, folder in run.audit.runs.items() for s in _training(name, Path(folder))],
        configs={"audit": run.to_yaml(), **{n: _config(Path(f)) for n, f in run.audit.runs.items()}},
        versions=installed_versions(PACKAGES),
        hashes=figures.hashes,
    )
    return write_report(report, Path(run.output_dir) / "report")


def read_figures(output_dir: str) -> AuditFigures:
    """Read the figures that ``dualtok audit`` left, with the settings they were measured with.

    Raises:
        DataError: there are none, or the file is malformed.
    """
    path = audit_folder(output_dir) / AUDIT_FILE
    try:
        return AuditFigures.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no audit yet; run `dualtok audit` first") from None
    except ValidationError as error:
        reason = " ".join(str(error.errors()[0]["msg"]).split())
        raise DataError(f"{path}: malformed ({reason}); run `dualtok audit` again") from None


def _history(name: str, folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    history = read_history(path)
    if not history:
        raise DataError(f"{path}: no training history of audit.runs[{name!r}]; give a training run's output_dir")
    return history


def _selection(name: str, folder: Path, history: list[dict[str, Any]]) -> SelectionSeries | None:
    """Return a run's shares over time, thinned to what a plot can show; None for objectives that select nothing."""
    run = _run_values(folder)
    folds = (run.get("reference") or {}).get("folds")
    if trained_objective(run.get("objective", ""), cross_fitted=bool(folds)) not in NEEDS_REFERENCE:
        return None
    kept = history[:: max(1, len(history) // MOST_POINTS)]
    return SelectionSeries(
        run=name,
        steps=[entry["step"] for entry in kept],
        hard=[entry["hard_tokens"] / max(entry["tokens"], 1) for entry in kept],
        memorized=[entry["memorized_tokens"] / max(entry["tokens"], 1) for entry in kept],
    )


def _training(name: str, folder: Path) -> list[TrainingSeries]:
    evaluations = read_history(folder / "evaluations.jsonl")
    series = []
    if evaluations:
        steps = [entry["step"] for entry in evaluations]
        gaps = [entry["validation_loss"] - entry["member_loss"] for entry in evaluations]
        series.append(TrainingSeries(run=name, figure="loss_gap", steps=steps, values=gaps))
    with_auc = [entry for entry in evaluations if entry["ref_auc"] is not None]
    if with_auc:
        values = [entry["ref_auc"] for entry in with_auc]
        series.append(TrainingSeries(run=name, figure="ref_auc", steps=[e["step"] for e in with_auc], values=values))
    return series


def _config(folder: Path) -> str:
    path = folder / "run.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _run_values(folder: Path) -> dict[str, Any]:
    values = yaml.safe_load(_config(folder))
    return values if isinstance(values, dict) else {}
