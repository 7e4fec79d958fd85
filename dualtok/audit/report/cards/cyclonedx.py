"""The report as a machine-learning bill of materials: CycloneDX 1.6 with a ``modelCard`` per audited model.

The specification is ECMA-424 (1st edition), https://cyclonedx.org/docs/1.6/json/. The same report gives the same bytes.
"""

from __future__ import annotations

import json
import uuid
from datetime import datetime
from typing import TYPE_CHECKING, Any

from dualtok import __version__
from dualtok.audit.report.cards.metrics import all_metrics
from dualtok.audit.report.scope import not_tested
from dualtok.audit.report.verdict import verdict_of

if TYPE_CHECKING:
    from dualtok.audit.report.cards.metrics import Metric
    from dualtok.audit.report.data import AuditReport, ModelAudit

SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:dualtok:report")
NO_GUARANTEE = "Attacks that fail are no guarantee: a stronger attack, or more documents, may find more."


def render_cyclonedx(report: AuditReport) -> str:
    """Return the bill as JSON text, with one component of type ``machine-learning-model`` per audited model.

    Paths, texts and configurations of the report are not part of it.
    """
    return json.dumps(bill_of_materials(report), indent=1) + "\n"


def bill_of_materials(report: AuditReport) -> dict[str, Any]:
    """Return the bill as nested dictionaries."""
    metadata: dict[str, Any] = {
        "tools": {"components": [{"type": "application", "name": "dualtok", "version": __version__}]}
    }
    if _is_time(report.created):
        metadata = {"timestamp": report.created, **metadata}
    return {
        "$schema": SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.uuid5(NAMESPACE, report.model_dump_json()).urn,
        "version": 1,
        "metadata": metadata,
        "components": [_component(number, row, report) for number, row in enumerate(report.rows, start=1)],
    }


def _is_time(text: str) -> bool:
    """Return whether a text is a time with its offset, as the specification wants it (RFC 3339)."""
    try:
        return "T" in text and datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _component(number: int, row: ModelAudit, report: AuditReport) -> dict[str, Any]:
    version = {} if row.step is None else {"version": f"step {row.step}"}
    return {
        "type": "machine-learning-model",
        "bom-ref": f"model-{number}",
        "name": row.name,
        **version,
        "description": verdict_of(row, report.checks).sentence,
        "modelCard": {
            "modelParameters": _parameters(row, report),
            "quantitativeAnalysis": {"performanceMetrics": [_metric(metric) for metric in all_metrics(row)]},
            "considerations": _considerations(row, report),
        },
        "properties": [{"name": f"dualtok:{name}", "value": value} for name, value in _properties(row, report).items()],
    }


def _parameters(row: ModelAudit, report: AuditReport) -> dict[str, Any]:
    kinds = {
        "members": (report.settings.sides_in_words[0], row.n_members),
        "non-members": (report.settings.sides_in_words[1], row.n_non_members),
    }
    datasets = [
        {"type": "dataset", "name": kind, "description": f"{count} documents that were audited as {kind} ({where})"}
        for kind, (where, count) in kinds.items()
    ]
    return {
        "approach": {"type": "self-supervised"},
        "task": "text-generation",
        "datasets": datasets,
        "inputs": [{"format": "text"}],
        "outputs": [{"format": "text"}],
    }


def _metric(metric: Metric) -> dict[str, Any]:
    """Return a figure with its interval; all numbers are strings in CycloneDX."""
    ends = {"lowerBound": metric.low, "upperBound": metric.high}
    interval = {name: f"{end:.6g}" for name, end in ends.items() if end is not None}
    shown = {"type": metric.name, "value": f"{metric.value:.6g}", "slice": metric.slice}
    return {**shown, "confidenceInterval": interval} if interval else shown


def _considerations(row: ModelAudit, report: AuditReport) -> dict[str, Any]:
    warnings = report.checks.warnings if report.checks is not None else []
    gaps = not_tested(report.model_copy(update={"rows": [row]}))
    limitations = [
        *(f"Doubtful: {warning}" for warning in warnings),
        *(f"Not tested: {gap.what} ({gap.why})" for gap in gaps),
        NO_GUARANTEE,
    ]
    private = report.identity.get(f"privacy of {row.name}")
    risk = {
        "name": "An attacker may find out whether a document was in the training data, or get parts of it back.",
        "mitigationStrategy": f"Differential privacy: {private}" if private else "None is stated by this report.",
    }
    return {"technicalLimitations": limitations, "ethicalConsiderations": [risk]}


def _properties(row: ModelAudit, report: AuditReport) -> dict[str, str]:
    """Return what has no place of its own: digests, the intervals' confidence, the gate's verdict."""
    digests = {"data": "data", "code": "code", f"model {row.name}": "model"}
    found = {f"sha256:{name}": report.hashes[key] for key, name in digests.items() if key in report.hashes}
    found["confidence"] = f"{report.settings.confidence:g}"
    if row.power is not None:
        found["power"] = f"an AUC of {row.power.auc:.4g} is seen with probability {row.power.probability:g}"
    for check in report.gate.checks if report.gate is not None else ():
        if check.model == row.name:
            value = check.reason if check.value is None else f"{check.value:.6g}"
            found[f"gate:{check.figure}"] = f"{check.verdict}: {value}, limit {check.limit:g}"
    return found
