from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest

from dualtok.audit.report.data import AuditReport, SelectionSeries
from dualtok.audit.report.figures import (
    histogram_figure,
    roc_figure,
    selection_figure,
    swatch,
    trade_off_figure,
    training_figure,
)


def all_figures(report: AuditReport) -> dict[str, str]:
    histogram = report.rows[0].calibrated
    assert histogram is not None
    return {
        "roc": roc_figure(report.rows, "ref", "roc"),
        "histogram": histogram_figure("plain <last>", histogram, "s"),
        "selection": selection_figure(report.selection[0], "sel"),
        "training": training_figure(report.training[:2], "gap"),
        "trade-off": trade_off_figure(report.rows, "trade"),
    }


def test_figures_are_inline_svg_with_a_description_and_nothing_from_outside(report: AuditReport) -> None:
    for name, svg in all_figures(report).items():
        root = ElementTree.fromstring(svg)
        assert root.tag == "svg", name
        assert root.attrib["role"] == "img"
        assert len(root.attrib["aria-label"]) > 20
        assert "://" not in svg
        assert not re.search(r"#0102\w\w", svg), f"{name}: a placeholder colour was left"
        assert "var(--series-0)" in svg
        assert "currentColor" in svg


def test_ids_differ_between_figures_and_references_point_within_one(report: AuditReport) -> None:
    seen: set[str] = set()
    for svg in all_figures(report).values():
        ids = re.findall(r'\bid="([^"]+)"', svg)
        assert len(set(ids)) == len(ids)
        assert not seen & set(ids)
        references = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
        assert references
        assert {one or other for one, other in references} <= set(ids)
        seen |= set(ids)


def test_the_same_data_gives_the_same_figure(report: AuditReport) -> None:
    assert all_figures(report) == all_figures(report)


def test_the_roc_axis_is_logarithmic_and_one_line_is_drawn_per_model(report: AuditReport) -> None:
    with_ref = roc_figure(report.rows, "ref", "a")
    with_loss = roc_figure(report.rows, "loss", "b")
    # Ticks 0.01, 0.1 and 1 lie at equal distances.
    places = {tick: float(x) for x, tick in re.findall(r'<text[^>]*x="([\d.]+)"[^>]*>(0\.01|0\.1|1)</text>', with_ref)}
    assert places["0.1"] - places["0.01"] == pytest.approx(places["1"] - places["0.1"], rel=1e-3)
    for index in range(3):  # the third model has no reference
        assert (f"var(--series-{index})" in with_ref) is (index < 2)
        assert f"var(--series-{index})" in with_loss
    assert ">Ref</text>" in with_ref


def test_labels_are_escaped_and_a_single_step_is_still_drawn(report: AuditReport) -> None:
    svg = selection_figure(SelectionSeries(run='a<b & "c"', steps=[5], hard=[0.6], memorized=[0.2]), "one")
    root = ElementTree.fromstring(svg)
    assert 'a<b & "c"' in root.attrib["aria-label"]
    assert any(text.text == 'a<b & "c"' for text in root.iter("text"))
    assert "var(--series-2)" in svg


@pytest.mark.parametrize("index", [0, 3, 11])
def test_swatches_repeat_the_colours(index: int) -> None:
    svg = ElementTree.fromstring(swatch(index))
    assert f"var(--series-{index % 8})" in svg[0].attrib["style"]
    assert ("stroke-dasharray" in svg[0].attrib) is (index % 8 != 0)


def test_every_model_of_the_trade_off_is_named_and_no_name_covers_another(large_report: AuditReport) -> None:
    crowded = [
        row.model_copy(
            update={"name": f"model {index}, of a name that is long", "strongest": large_report.rows[1].strongest}
        )
        for index, row in enumerate(large_report.rows)
    ]
    for rows in (large_report.rows, crowded, large_report.rows[:1]):
        svg = trade_off_figure(rows, "t")
        names = [row.name if len(row.name) <= 22 else f"{row.name[:21]}…" for row in rows]
        heights = [
            float(y) for y, name in re.findall(r'<text[^>]*? y="([\d.]+)"[^>]*>([^<]+)</text>', svg) if name in names
        ]
        assert len(heights) == len(rows)
        assert all(after - before > 7 for before, after in itertools.pairwise(sorted(heights)))  # of a font of 9 points
    assert "of a name that is long" in trade_off_figure(crowded, "t").partition(">")[0]
