"""An audit's figures for a model card of Hugging Face: ``model-index`` metadata, and a short table in Markdown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dualtok.audit.report.cards.metrics import headline_metrics
from dualtok.audit.report.tables import interval, perplexity, share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualtok.audit.report.base import Estimate
    from dualtok.audit.report.data import AuditFigures, ModelAudit

TASK = "text-generation"
DIGITS = 4


def model_index(name: str, row: ModelAudit, figures: AuditFigures) -> list[dict[str, Any]]:
    """Return the value of a card's ``model-index``: what was measured of this model, with intervals in ``args``.

    Figures that are no finite number are left out.

    Args:
        name: of the model that the card is about.
        row: its figures.
        figures: the audit that they are of.
    """
    settings = figures.settings
    metrics = []
    for metric in headline_metrics(row):
        if not math.isfinite(metric.value):
            continue
        ends = {"low": metric.low, "high": metric.high}
        arguments: dict[str, Any] = {key: round(end, DIGITS) for key, end in ends.items() if end is not None}
        if arguments:
            arguments["confidence"] = settings.confidence
        arguments["of"] = metric.slice
        value = round(metric.value, DIGITS)
        metrics.append({"type": metric.kind, "value": value, "name": metric.name, "args": arguments})
    documents = {
        "name": f"private documents, {row.n_members} members and {row.n_non_members} non-members",
        "type": "private",
    }
    return [{"name": name, "results": [{"task": {"type": TASK}, "dataset": documents, "metrics": metrics}]}]


def markdown_table(rows: Sequence[ModelAudit]) -> str:
    """Return one line per model: the strongest attack, its true-positive rate, what comes back, and perplexity."""
    lines = [
        "| model | strongest attack, AUC | TPR | given back word for word | held-out perplexity |",
        "|---|---|---|---|---|",
        *(_line(row) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _line(row: ModelAudit) -> str:
    best = row.strongest
    lowest = min(row.strongest_tpr, key=lambda rate: rate.target_fpr, default=None)
    rate = "n/a" if lowest is None else f"{_figure(lowest.tpr)} at {100 * lowest.target_fpr:g} % FPR"
    name = row.name.replace("|", "\\|")
    strongest = f"{_figure(best.auc_two_sided)} ({best.label})"
    return f"| {name} | {strongest} | {rate} | {_given_back(row)} | {perplexity(row.perplexity_non_members)} |"


def _given_back(row: ModelAudit) -> str:
    shares = []
    if row.regurgitation is not None:
        shares.append(f"{_figure(row.regurgitation.extracted_members)} of the members")
    if row.canaries is not None and row.canaries.extracted_included is not None:
        shares.append(f"{_figure(row.canaries.extracted_included)} of the canaries")
    return ", ".join(shares) or "n/a"


def _figure(found: Estimate) -> str:
    return f"{share(found.value)} {interval(found)}"
