"""Writes an audit as a page to read (HTML), as data (JSON, CycloneDX) and as a table (CSV)."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtok.audit.report.base import Estimate
from dualtok.audit.report.cards.cyclonedx import render_cyclonedx
from dualtok.audit.report.data import AuditReport, CanaryAudit, Checks
from dualtok.audit.report.details import Regurgitation, RunLengths
from dualtok.audit.report.page import render_html
from dualtok.errors import DataError
from dualtok.files import write_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dualtok.audit.report.details import GroupAudit

CSV_COLUMNS = ("model", "step", "attack", "metric", "value", "low", "high", "target_fpr", "attained_fpr", "note")


def write_report(report: AuditReport, folder: str | Path) -> Path:
    """Write ``report.json``, ``.csv``, ``.cdx.json`` and ``.html`` into ``folder`` and return the path of the last.

    The page is one file: no script, nothing is fetched when it is opened. Each file is written whole or not at all.
    """
    folder = Path(folder)
    page = render_html(report)
    write_text(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    write_text(folder / "report.csv", render_csv(report))
    write_text(folder / "report.cdx.json", render_cyclonedx(report))
    write_text(folder / "report.html", page)
    return folder / "report.html"


def load_report(path: str | Path) -> AuditReport:
    """Read a ``report.json``.

    Raises:
        DataError: the file is missing, or not a report of this version.
    """
    try:
        return AuditReport.model_validate_json(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        reason = str(error).replace("\n", " ")
        raise DataError(f"{path}: not a readable audit report ({reason}); run `dualtok audit` again") from error


def render_csv(report: AuditReport) -> str:
    """Return one line per model, attack and metric; numbers have all their digits, cells without a value are empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(csv_rows(report))
    return buffer.getvalue()


def csv_rows(report: AuditReport) -> Iterator[dict[str, Any]]:
    """Yield the lines of the CSV as dictionaries with some of the keys :data:`CSV_COLUMNS`."""
    for row in report.rows:
        model = {"model": row.name, "step": "" if row.step is None else row.step}
        for metric in ("n_members", "n_non_members", "perplexity_members", "perplexity_non_members", "loss_gap"):
            yield model | {"metric": metric, "value": getattr(row, metric)}
        for result in row.attacks:
            attack = model | {"attack": result.name}
            yield attack | {"metric": "auc"} | _cells(result.auc)
            yield attack | {"metric": "auc_two_sided"} | _cells(result.auc_two_sided)
            for rate in result.tpr:
                line = attack | {"metric": "tpr", "target_fpr": rate.target_fpr, "note": rate.note}
                if rate.tpr is not None:
                    line |= _cells(rate.tpr) | {"attained_fpr": rate.attained_fpr}
                yield line
        for test in row.collections:
            collection = model | {"attack": f"{test.label}, {test.size} documents"}
            for metric in ("p_value", "p_holm"):
                yield collection | {"metric": f"collection_{metric}", "value": getattr(test, metric)}
            ends = {"low": test.rejected_low, "high": test.rejected_high}
            yield collection | {"metric": "collection_rejected", "value": test.rejected} | ends
        if row.regurgitation is not None:
            yield from (model | line for line in _regurgitation_rows(row.regurgitation))
        if row.groups is not None:
            yield from (model | line for line in _group_rows(row.groups))
        if row.canaries is not None:
            yield from (model | line for line in _canary_rows(row.canaries))
        if row.strongest_p_value is not None:
            yield model | {"metric": "strongest_p_value", "value": row.strongest_p_value}
        yield (
            model
            | {"metric": "strongest_auc_two_sided", "note": row.strongest.label}
            | _cells(row.strongest.auc_two_sided)
        )
    if report.checks is not None:
        yield from _check_rows(report.checks)


def _regurgitation_rows(found: Regurgitation) -> Iterator[dict[str, Any]]:
    for side in ("members", "non_members"):
        yield {"metric": f"extracted_{side}", "note": f"{found.length} tokens"} | _cells(
            getattr(found, f"extracted_{side}")
        )
        yield {"metric": f"greedy_tokens_{side}", "value": getattr(found, f"greedy_{side}")}
        yield from _run_rows(f"greedy_run_{side}", getattr(found, f"runs_{side}"))
        for cost in found.costs:
            passages = {"attack": f"passages of {cost.length} tokens"}
            for metric in ("bits", "greedy_windows"):
                value = getattr(cost, f"{metric}_{side}")
                if value is not None:
                    yield passages | {"metric": f"extraction_{metric}_{side}", "value": value}
            for within in cost.within:
                estimate = getattr(within, side)
                if estimate is not None:
                    yield passages | {"metric": f"within_{within.bits:g}_bits_{side}"} | _cells(estimate)
        if (after := found.continuations) is not None:
            note = f"{after.tokens} tokens after {after.prefix}, {len(getattr(after, side))} documents"
            yield {"metric": f"continued_whole_{side}", "note": note} | _cells(getattr(after, f"whole_{side}"))
            yield from _run_rows(f"continued_run_{side}", getattr(after, f"runs_{side}"))


def _run_rows(metric: str, runs: RunLengths | None) -> Iterator[dict[str, Any]]:
    if runs is not None:
        yield {"metric": f"{metric}_median", "value": runs.median}
        yield {"metric": f"{metric}_largest", "value": runs.largest}


def _group_rows(groups: GroupAudit) -> Iterator[dict[str, Any]]:
    for metric in (
        *(f"{side}_groups" for side in ("member", "non_member", "small_member", "small_non_member")),
        *(f"{side}_without_group" for side in ("members", "non_members")),
    ):
        yield {"metric": f"group_{metric}", "value": getattr(groups, metric)}
    whole = {"note": groups.strongest_label}
    yield {"metric": "group_strongest_auc_two_sided"} | whole | _cells(groups.strongest)
    yield {"metric": "group_strongest_p_value", "value": groups.strongest_p_value} | whole
    worst = groups.worst
    note = {"note": f"{worst.name}, {worst.documents} documents, {worst.label}"}
    yield {"metric": "worst_group_auc_two_sided"} | note | _cells(worst.auc)
    for metric in ("p_value", "p_value_among_members"):
        yield {"metric": f"worst_group_{metric}", "value": getattr(worst, metric)} | note


def _canary_rows(canaries: CanaryAudit) -> Iterator[dict[str, Any]]:
    for metric in ("n_included", "n_excluded", "space_bits", "candidates"):
        yield {"metric": f"canary_{metric}", "value": getattr(canaries, metric)}
    for score in canaries.scores:
        if score.auc is not None:
            yield {"attack": score.label.lower(), "metric": "canary_auc"} | _cells(score.auc)
    for side in ("included", "excluded"):
        for kind in ("ranked", "extrapolated"):
            exposures = getattr(getattr(canaries, kind), side)
            if exposures:
                yield {"metric": f"canary_exposure_{kind}_{side}", "value": statistics.median(exposures)}
        extracted = getattr(canaries, f"extracted_{side}")
        if extracted is not None:
            yield {"metric": f"canary_extracted_{side}"} | _cells(extracted)
    for bound in (*canaries.epsilon, *canaries.other_bounds):
        suffix = "" if bound in canaries.epsilon else f"_{bound.method}"
        note = f"delta {bound.delta:g}: {bound.correct} of {bound.guesses} guesses right, best of {bound.tests}"
        of = {"attack": bound.label.lower(), "note": note}
        yield of | {"metric": f"canary_epsilon{suffix}", "value": bound.epsilon}
        if bound.mu is not None:
            yield of | {"metric": f"canary_mu{suffix}", "value": bound.mu}


def _check_rows(checks: Checks) -> Iterator[dict[str, Any]]:
    if checks.blind_auc is not None:
        yield {"metric": "blind_auc"} | _cells(checks.blind_auc)
    for metric in ("duplicates", "shared_passages"):
        yield {"metric": metric, "value": getattr(checks, metric)}
    for warning in checks.warnings:
        yield {"metric": "warning", "note": warning}


def _cells(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}
