"""The report's page: what its templates are given, and how they are filled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from dualtok.audit.attacks.registry import ATTACKS
from dualtok.audit.report import figures, scope, tables
from dualtok.audit.report.verdict import percent, short, tpr_at, verdict_of

if TYPE_CHECKING:
    from dualtok.audit.report.base import Estimate
    from dualtok.audit.report.data import AuditReport, ModelAudit
    from dualtok.audit.report.verdict import Verdict

NOT_TESTED = "not tested"


@dataclass(frozen=True)
class Cell:
    """One cell of the summary: a figure, and below it what it is the figure of."""

    main: str
    small: str = ""


@dataclass(frozen=True)
class Summary:
    """One row of the first screen's table."""

    model: ModelAudit
    verdict: Verdict
    strongest: Cell
    tpr: Cell
    group: Cell
    extraction: Cell
    perplexity: Cell


def render_html(report: AuditReport) -> str:
    """Return the page: one file of HTML, without scripts, that fetches nothing and holds no text of a document."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dualtok.audit.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "share": tables.share,
        "interval": tables.interval,
        "perplexity": tables.perplexity,
        "heat": _heat,
        "percent": percent,
        "median_exposure": tables.median_exposure,
    }
    measured = {
        rate.target_fpr for row in report.rows for attack in row.attacks for rate in attack.tpr if rate.tpr is not None
    }
    attacks = tables.attack_columns(report.rows)
    return environment.get_template("report.html.j2").render(
        report=report,
        summaries=[summary_of(row, report) for row in report.rows],
        scope=scope,
        measured=measured,
        attacks=attacks,
        published={name: label for name, label in attacks.items() if tables.plain(name) not in tables.KNOWS_DEFENCE},
        adaptive={name: label for name, label in attacks.items() if tables.plain(name) in tables.KNOWS_DEFENCE},
        tests=list(dict.fromkeys((test.label, test.size) for row in report.rows for test in row.collections)),
        sources={name: ATTACKS[tables.plain(name)].source for name in attacks if tables.plain(name) in ATTACKS},
        with_canaries=[row for row in report.rows if row.canaries is not None],
        **_figures(report),
    )


def summary_of(model: ModelAudit, report: AuditReport) -> Summary:
    """Return a model's row of the first screen's table; what was not tested is said to be so."""
    best, rate, groups = model.strongest, tpr_at(model), model.groups
    return Summary(
        model=model,
        verdict=verdict_of(model, report.checks),
        strongest=Cell(short(best.auc_two_sided), best.label),
        tpr=Cell(NOT_TESTED) if rate is None else Cell(_percents(rate.tpr), rate.label),
        group=Cell(NOT_TESTED)
        if groups is None
        else Cell(short(groups.worst.auc), f"{groups.worst.name}, {groups.worst.documents} documents"),
        extraction=_extraction(model),
        perplexity=Cell(_rounded(model.perplexity_non_members), f"training {_rounded(model.perplexity_members)}"),
    )


def _extraction(model: ModelAudit) -> Cell:
    again, found = model.regurgitation, model.canaries
    secrets = ""
    if found is not None and found.extracted_included is not None:
        secrets = f"{percent(found.extracted_included.value)} of canaries' secrets"
    if again is None:
        return Cell(secrets or NOT_TESTED)
    others = f"{percent(again.extracted_non_members.value)} of non-members"
    return Cell(f"{percent(again.extracted_members.value)} of members", "; ".join(filter(None, (others, secrets))))


def _percents(estimate: Estimate) -> str:
    ends = ", ".join(percent(end).removesuffix("\N{NO-BREAK SPACE}%") for end in (estimate.low, estimate.high))
    return f"{percent(estimate.value)} [{ends}]"


def _rounded(perplexity: float) -> str:
    return f"{perplexity:.1f}" if perplexity < 1000 else tables.perplexity(perplexity)


def _figures(report: AuditReport) -> dict[str, Any]:
    attacks = tables.attack_columns(report.rows)
    plotted = [row for row in report.rows if math.isfinite(row.perplexity_non_members)]
    with_s = [row for row in report.rows if row.calibrated is not None]
    drawn = [series for series in report.training if series.steps]
    return {
        "swatches": [Markup(figures.swatch(index)) for index in range(len(report.rows))],
        "roc_figures": {name: Markup(figures.roc_figure(report.rows, name, f"roc-{name}")) for name in attacks},
        "trade_off_figure": Markup(figures.trade_off_figure(plotted, "trade-off")) if len(plotted) > 1 else "",
        "histogram_rows": with_s,
        "histogram_figures": [
            Markup(figures.histogram_figure(row.name, row.calibrated, f"s-{index}"))
            for index, row in enumerate(with_s)
            if row.calibrated is not None
        ],
        "canary_figures": [
            Markup(figures.canary_figure(row.name, row.canaries, f"canaries-{index}"))
            for index, row in enumerate(report.rows)
            if row.canaries is not None and row.canaries.candidates
        ],
        "selection_figures": [
            Markup(figures.selection_figure(series, f"selection-{index}"))
            for index, series in enumerate(report.selection)
            if series.steps
        ],
        "training_figures": [
            Markup(figures.training_figure(of_kind, f"training-{kind}"))
            for kind in figures.METRIC_LABELS
            if (of_kind := [series for series in drawn if series.figure == kind])
        ],
    }


def _heat(two_sided_auc: float) -> str:
    """Return a share of colour for a cell: none at .5 (no better than chance), full at 1."""
    return f"{max(0.0, two_sided_auc - 0.5) * 2:.2f}"
