"""The report's figures as SVG text for inlining in HTML: no script, nothing fetched, colours from the page's style.

Colours are drawn as placeholders and then replaced by CSS variables, so that one figure is legible on light and
dark pages; line styles repeat what colours say.
"""

from __future__ import annotations

import io
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, NullFormatter, PercentFormatter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from matplotlib.axes import Axes

    from dualtok.audit.report.data import CanaryAudit, ModelAudit, SelectionSeries, TokenHistogram, TrainingSeries

# Placeholders: colours that nothing else uses.
_INK, _GRID = "#010203", "#010204"
_SERIES = tuple(f"#0102{16 + index:02x}" for index in range(8))
_REPLACED = {_INK: "currentColor", _GRID: "var(--grid)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(_SERIES)
}
_DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (6, 2),
    (2, 2),
    (6, 2, 2, 2),
    (10, 3),
    (2, 1, 2, 4),
    (8, 2, 2, 2, 2, 2),
    (1, 3),
)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, and read by screen readers
    "svg.hashsalt": "dualtok",  # the same data gives the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}
LONGEST_NAME = 22
"""Characters of a model's name in the trade-off plot."""
METRIC_LABELS = {"loss_gap": "loss gap, nats per token", "ref_auc": "AUC of the Ref attack"}


def swatch(index: int) -> str:
    """Return a short SVG line in the colour and dash of series ``index``, for a legend in HTML."""
    dashes = " ".join(f"{dash * 1.5:g}" for dash in _DASHES[index % len(_DASHES)])
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    colour = f"var(--series-{index % len(_SERIES)})"
    return (
        '<svg class="swatch" width="34" height="10" aria-hidden="true">'
        f'<line x1="0" y1="5" x2="34" y2="5" style="stroke:{colour}" stroke-width="2.5"{dash}/></svg>'
    )


def roc_figure(rows: Sequence[ModelAudit], attack: str, identifier: str) -> str:
    """Return the ROC curves of one attack, one line per model that ran it, over a logarithmic FPR axis."""
    label = next(result.label for row in rows if (result := row.attack(attack)))
    # Half a false positive stands for none: a logarithmic axis has no zero.
    left = 0.5 / max(row.n_non_members for row in rows)
    # Small, so that its text can be read where many stand side by side; the page makes text small and lines thin again
    # where one is enlarged.
    with _axes(f"{identifier}-", (2.9, 2.45)) as (axes, finish):
        chance = np.geomspace(left, 1, 100)
        axes.plot(chance, chance, color=_INK, linewidth=0.9, alpha=0.7)
        for index, row in enumerate(rows):
            if result := row.attack(attack):
                fpr = np.maximum(result.roc.fpr, left)
                # Stairs, not slopes: the rate that our rule gives between two attainable thresholds.
                axes.plot(fpr, result.roc.tpr, drawstyle="steps-post", **_line(index))
        axes.set(
            xscale="log", xlim=(left, 1), ylim=(0, 1.02), xlabel="false-positive rate", ylabel="true-positive rate"
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(label, fontsize=11)
        return finish(f"ROC curves of the {label} attack for {len(rows)} models, logarithmic false-positive axis")


def trade_off_figure(rows: Sequence[ModelAudit], identifier: str) -> str:
    """Return every model's held-out perplexity against the two-sided AUC of its strongest attack, with its interval."""
    with _axes(f"{identifier}-", (5.4, 3.5)) as (axes, finish):
        for index, row in enumerate(rows):
            auc, x = row.strongest.auc_two_sided, row.perplexity_non_members
            color = _SERIES[index % len(_SERIES)]
            axes.plot([x, x], [auc.low, auc.high], color=color)
            axes.plot([x], [auc.value], marker="o", markersize=6, color=color)
        perplexities = [row.perplexity_non_members for row in rows]
        if max(perplexities) > 10 * min(perplexities):
            axes.set_xscale("log")
        axes.axhline(0.5, color=_INK, linewidth=0.9, alpha=0.7)
        axes.set(xlabel="held-out perplexity", ylabel="strongest attack, AUC", ylim=(0.48, 1.01))
        # Names stand in a column beside the axes, spread so that none covers another, each joined to its point.
        order = sorted(rows, key=lambda row: row.strongest.auc_two_sided.value)
        for row, height in zip(order, _spread([row.strongest.auc_two_sided.value for row in order]), strict=True):
            axes.annotate(
                row.name if len(row.name) <= LONGEST_NAME else f"{row.name[: LONGEST_NAME - 1]}…",
                xy=(row.perplexity_non_members, row.strongest.auc_two_sided.value),
                xytext=(1.04, height),
                textcoords=("axes fraction", "data"),
                va="center",
                fontsize=9,
                arrowprops={"arrowstyle": "-", "color": _INK, "linewidth": 0.5, "alpha": 0.5, "shrinkB": 4},
            )
        names = ", ".join(row.name for row in rows)
        return finish(f"Held-out perplexity against the AUC of the strongest attack: {names}")


def _spread(heights: Sequence[float], gap: float = 0.042) -> list[float]:
    """Return ascending heights moved apart to at least ``gap``, and together back into [.5, 1] if they leave it."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    beyond = max(0.0, moved[-1] - 1.0)
    return [height - beyond for height in moved] if moved[0] - beyond >= 0.5 else _even(len(moved))


def _even(count: int) -> list[float]:
    return [float(height) for height in np.linspace(0.5, 1.0, count)]


def histogram_figure(name: str, histogram: TokenHistogram, identifier: str) -> str:
    """Return the share of tokens per bin of s(t), for one model's members and non-members."""
    edges = np.array(histogram.edges)
    with _axes(f"{identifier}-", (4.0, 2.9)) as (axes, finish):
        classes = (("members", histogram.members), ("non-members", histogram.non_members))
        for index, (label, counts) in enumerate(classes):
            shares = np.array(counts) / max(1, sum(counts))
            axes.stairs(shares, edges, color=_SERIES[index], alpha=0.18, fill=True)
            axes.plot(edges, np.append(shares, shares[-1]), drawstyle="steps-post", label=label, **_line(index))
        axes.axvline(0, color=_INK, linewidth=0.8)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set(xlabel="s(t), nats", ylabel="share of tokens", xlim=(edges[0], edges[-1]))
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MultipleLocator(4))
        axes.set_title(name, fontsize=11)
        axes.legend(fontsize=8, loc="upper right")
        return finish(f"Distribution of the calibrated loss s(t) over the tokens of members and non-members: {name}")


def canary_figure(name: str, canaries: CanaryAudit, identifier: str) -> str:
    """Return the share of one model's canaries with at least so much exposure, included and left out."""
    with _axes(f"{identifier}-", (4.0, 2.9)) as (axes, finish):
        exposures = canaries.extrapolated
        for index, (label, values) in enumerate((("included", exposures.included), ("left out", exposures.excluded))):
            edges = np.concatenate([[0.0], np.sort(values), [canaries.space_bits]])
            above = np.linspace(1, 0, len(values) + 1)
            axes.plot(edges, np.append(above, above[-1]), drawstyle="steps-post", label=label, **_line(index))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set(xlabel="exposure, bits", ylabel="share of canaries", xlim=(0, canaries.space_bits), ylim=(0, 1.02))
        axes.set_title(name, fontsize=11)
        axes.legend(fontsize=8, loc="upper right")
        return finish(f"Share of canaries with at least so much exposure, included and left out: {name}")


def selection_figure(series: SelectionSeries, identifier: str) -> str:
    """Return the shares of hard, neutral and memorized tokens over one run's training steps, stacked."""
    with _axes(f"{identifier}-", (4.0, 2.9)) as (axes, finish):
        parts = (
            ("hard (learned)", series.hard),
            ("neutral", series.neutral),
            ("memorized (unlearned)", series.memorized),
        )
        base = np.zeros(len(series.steps))
        for index, (label, values) in enumerate(parts):
            top = base + np.array(values)
            axes.fill_between(series.steps, base, top, color=_SERIES[index], alpha=0.35, linewidth=0)
            axes.plot(series.steps, top, label=label, **(_line(index) | ({"marker": "o"} if len(base) == 1 else {})))
            base = top
        axes.set(ylim=(0, 1.001), xlabel="training step", ylabel="share of tokens")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.set_title(series.run, fontsize=11)
        axes.legend(fontsize=8, loc="lower right")
        return finish(f"Shares of hard, neutral and memorized tokens over the training of {series.run}")


def training_figure(series: Sequence[TrainingSeries], identifier: str) -> str:
    """Return one figure of several runs over their training steps."""
    label = METRIC_LABELS[series[0].figure]
    with _axes(f"{identifier}-", (4.0, 2.9)) as (axes, finish):
        for index, run in enumerate(series):
            axes.plot(run.steps, run.values, label=run.run, marker="o", markersize=3, **_line(index))
        axes.axhline(0.5 if series[0].figure == "ref_auc" else 0.0, color=_INK, linewidth=0.9, alpha=0.7)
        axes.set(xlabel="training step", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.legend(fontsize=8)
        return finish(f"{label} over training of {', '.join(run.run for run in series)}")


def _line(index: int) -> dict[str, Any]:
    dashes = _DASHES[index % len(_DASHES)]
    return {"color": _SERIES[index % len(_SERIES)], "linestyle": (0, dashes) if dashes else "solid"}


@contextmanager
def _axes(prefix: str, size: tuple[float, float]) -> Iterator[tuple[Axes, Callable[[str], str]]]:
    """Give axes to draw on, and a function that turns them into SVG with the given description."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        yield axes, lambda description: _svg(figure, prefix, description)


def _svg(figure: Figure, prefix: str, description: str) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    # Several figures share one page: their ids must not meet.
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'href="#', f'href="#{prefix}', text)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    for placeholder, colour in _REPLACED.items():
        text = text.replace(placeholder, colour)
    escaped = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escaped}" ', 1)
