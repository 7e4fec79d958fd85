from __future__ import annotations

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from dualtok.audit.attacks.registry import ATTACKS, names_of
from dualtok.audit.report.data import AuditReport
from dualtok.audit.report.page import render_html
from dualtok.audit.report.tables import interval, share
from dualtok.audit.report.write import CSV_COLUMNS, load_report, render_csv, write_report
from dualtok.errors import DataError
from tests.audit.conftest import ATTACK_NAMES
from tests.audit.report.test_tables import with_continuations

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.audit.report.details import Regurgitation

ONE_PASS = names_of("single_pass", "joint")
KNOWING = names_of("knows_defence")

VOID = {"meta", "br", "img", "input", "hr", "link"}


class Page(HTMLParser):
    """Tables as lists of rows of cell texts, addresses that a browser would fetch, links, and unbalanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.captions: list[str] = []
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.figures = 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "a":
            self.links.append(values["href"])
        else:
            urls = [
                values[name] for name in ("src", "href", "xlink:href", "data", "action", "srcset") if name in values
            ]
            self.fetched += [url for url in urls if not url.startswith("#")]
        self.figures += values.get("role") == "img"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
            self.ids.append(values.get("id", values.get("class", "")))
            self.captions.append("")
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"<{tag}> is closed out of turn"

    def handle_data(self, data: str) -> None:
        if "caption" in self.open:
            self.captions[-1] += data
        elif {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def named(self, name: str) -> list[list[list[str]]]:
        """Return the tables of an id, or of a class."""
        return [table for table, own in zip(self.tables, self.ids, strict=True) if own == name]


@pytest.fixture(scope="module")
def html(report: AuditReport) -> str:
    return render_html(report)


def test_the_files_are_written_and_read_back(report: AuditReport, tmp_path: Path) -> None:
    page = write_report(report, tmp_path / "audit")
    assert page == tmp_path / "audit" / "report.html"
    written = ["report.cdx.json", "report.csv", "report.html", "report.json"]
    assert sorted(file.name for file in page.parent.iterdir()) == written
    assert load_report(page.with_suffix(".json")) == report
    assert page.read_text(encoding="utf-8") == render_html(report)
    assert page.with_suffix(".csv").read_text(encoding="utf-8") == render_csv(report)


def test_a_report_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(DataError, match=r"report\.json: not a readable audit report"):
        load_report(path)
    path.write_text('{"title": 3}')
    with pytest.raises(DataError, match=r"report\.json: not a readable audit report .*title") as caught:
        load_report(path)
    assert "\n" not in str(caught.value)
    path.write_text('{"format": "dualtok-report/2"}')
    with pytest.raises(DataError, match="its format is 'dualtok-report/2', this version of dualtok reads"):
        load_report(path)


def test_csv_has_one_line_per_model_attack_and_metric_equal_to_the_input(report: AuditReport) -> None:
    lines = list(csv.DictReader(render_csv(report).splitlines()))
    assert tuple(lines[0]) == CSV_COLUMNS
    keys = [(line["model"], line["attack"], line["metric"], line["target_fpr"]) for line in lines]
    assert len(set(keys)) == len(keys)
    by_key = dict(zip(keys, lines, strict=True))
    for row in report.rows:
        for metric in ("n_members", "n_non_members", "perplexity_members", "perplexity_non_members", "loss_gap"):
            assert float(by_key.pop((row.name, "", metric, ""))["value"]) == getattr(row, metric)
        strongest = by_key.pop((row.name, "", "strongest_auc_two_sided", ""))
        assert float(strongest["low"]) == row.strongest.auc_two_sided.low
        assert (strongest["note"], strongest["step"]) == (row.strongest.label, "300")
        for attack in row.attacks:
            for metric, estimate in (("auc", attack.auc), ("auc_two_sided", attack.auc_two_sided)):
                line = by_key.pop((row.name, attack.name, metric, ""))
                numbers = [float(line[column]) for column in ("value", "low", "high")]
                assert numbers == [estimate.value, estimate.low, estimate.high]
            for rate in attack.tpr:
                line = by_key.pop((row.name, attack.name, "tpr", str(rate.target_fpr)))
                assert line["note"] == rate.note
                if rate.tpr is None:
                    assert (line["value"], line["attained_fpr"]) == ("", "")
                else:
                    assert (float(line["value"]), float(line["attained_fpr"])) == (rate.tpr.value, rate.attained_fpr)
        for test in row.collections:
            for metric in ("p_value", "p_holm", "rejected"):
                line = by_key.pop((row.name, f"{test.label}, {test.size} documents", f"collection_{metric}", ""))
                assert float(line["value"]) == getattr(test, metric)
        assert float(by_key.pop((row.name, "", "strongest_p_value", ""))["value"]) == row.strongest_p_value
        assert row.regurgitation is not None
        for (label, metric), expected in regurgitation_figures(row.regurgitation).items():
            line = by_key.pop((row.name, label, metric, ""))
            assert [float(line[column] or "nan") for column in ("value", "low", "high")][: len(expected)] == expected
    assert report.checks is not None
    assert report.checks.blind_auc is not None
    assert float(by_key.pop(("", "", "blind_auc", ""))["high"]) == report.checks.blind_auc.high
    for metric in ("duplicates", "shared_passages"):
        assert float(by_key.pop(("", "", metric, ""))["value"]) == getattr(report.checks, metric)
    assert by_key == {}


def regurgitation_figures(own: Regurgitation) -> dict[tuple[str, str], list[float]]:
    """(Attack, metric) of a line -> its value, and the ends of its interval where there is one."""
    found: dict[tuple[str, str], list[float]] = {}
    for side, extracted, greedy, runs in (
        ("members", own.extracted_members, own.greedy_members, own.runs_members),
        ("non_members", own.extracted_non_members, own.greedy_non_members, own.runs_non_members),
    ):
        assert runs is not None
        found["", f"extracted_{side}"] = [extracted.value, extracted.low, extracted.high]
        found["", f"greedy_tokens_{side}"] = [greedy]
        found["", f"greedy_run_{side}_median"] = [runs.median]
        found["", f"greedy_run_{side}_largest"] = [runs.largest]
        for cost in own.costs:
            label, ours = f"passages of {cost.length} tokens", side == "members"
            bits = cost.bits_members if ours else cost.bits_non_members
            rate = cost.greedy_windows_members if ours else cost.greedy_windows_non_members
            if bits is None or rate is None:
                continue
            found |= {(label, f"extraction_bits_{side}"): [bits], (label, f"extraction_greedy_windows_{side}"): [rate]}
            for within in cost.within:
                estimate = within.members if ours else within.non_members
                assert estimate is not None
                metric = f"within_{within.bits:g}_bits_{side}"
                found[label, metric] = [estimate.value, estimate.low, estimate.high]
    return found


def test_csv_has_the_continuations(report: AuditReport) -> None:
    rows = with_continuations(report.rows)
    lines = list(csv.DictReader(render_csv(report.model_copy(update={"rows": rows})).splitlines()))
    found = {line["metric"]: line for line in lines if line["model"] == rows[0].name}
    whole = found["continued_whole_members"]
    assert (float(whole["value"]), float(whole["high"])) == (1 / 3, 0.9057)
    assert whole["note"] == "40 tokens after 50, 3 documents"
    assert found["continued_run_members_largest"]["value"] == "40"
    assert found["continued_run_non_members_median"]["value"] == "2.0"


def test_tables_hold_the_input(report: AuditReport, html: str) -> None:
    page = Page(html)
    assert page.open == []
    (auc,), (two_sided,), (adaptive,), (collections,) = map(page.named, ("auc", "two-sided", "adaptive", "collections"))
    rates = page.named("tpr")  # two of the three targets can be measured
    assert len(rates) == 2
    assert auc[0] == ["model", "held-out PPL", "training PPL", "loss gap", *(ATTACKS[name].label for name in ONE_PASS)]
    assert adaptive[0] == ["model", *(ATTACKS[name].label for name in KNOWING)]
    for index, row in enumerate(report.rows):
        assert auc[index + 1][0] == two_sided[index + 1][0] == row.name
        assert auc[index + 1][1] == f"{row.perplexity_non_members:.3f}"
        assert collections[index + 1][0] == row.name
        cells = dict(zip(collections[0], collections[index + 1], strict=True))
        for test in row.collections:
            shown = f"{share(test.p_value)}{share(test.p_holm)}; {share(test.rejected, 2)} of {test.collections}"
            assert cells[f"{test.label}, {test.size}"] == shown
        best, p_value = row.strongest, row.strongest_p_value
        assert p_value is not None
        shown = f"{share(best.auc_two_sided.value)} {best.label}{interval(best.auc_two_sided)}; p {share(p_value)}"
        assert two_sided[index + 1][-1] == shown
        for column, name in enumerate(KNOWING):
            result = row.attack(name)
            shown = "n/a" if result is None else share(result.auc.value) + interval(result.auc)
            assert adaptive[index + 1][1 + column] == shown
        for column, name in enumerate(ONE_PASS):
            result = row.attack(name)
            if result is None:
                assert auc[index + 1][4 + column] == two_sided[index + 1][3 + column] == "n/a"
                continue
            assert auc[index + 1][4 + column] == share(result.auc.value) + interval(result.auc)
            cell = share(result.auc_two_sided.value) + interval(result.auc_two_sided)
            assert two_sided[index + 1][3 + column] == cell
            assert [rate.tpr is None for rate in result.tpr] == [False, False, True]
            for table, rate in zip(rates, result.tpr, strict=False):
                entry = table[index + 1][table[0].index(result.label)]
                assert rate.tpr is not None
                assert entry.replace("*", "").startswith(share(rate.tpr.value) + interval(rate.tpr))
                assert entry.endswith(f" at {rate.attained_fpr:.3g}")
    assert all(page.captions)
    # Summary, requirements; AUC, two-sided, adaptive; passages and what they cost; collections; two rates; s(t).
    assert len(page.captions) == len(page.tables) == 2 + 3 + 2 + 1 + 2 + 1


def test_an_n_a_says_why(html: str) -> None:
    assert "TPR at an FPR of at most 0.001: n/a for every model, with fewer than 1/0.001 non-members." in html
    assert 'title="needs reference">n/a' in html
    assert "base: not run were Ref (needs reference), Zlib (needs zlib), DC-PDD (needs frequencies)" in html


def test_nothing_is_fetched_and_the_browser_is_told_so(html: str) -> None:
    page = Page(html)
    assert page.fetched == []
    assert page.links == ["https://arxiv.org/abs/2502.19726"]
    assert html.count("://") == len(page.links)
    assert "@import" not in html
    assert "<script" not in html
    assert "default-src 'none'" in html


def test_text_of_the_run_is_escaped(html: str) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "dual &lt;best&gt; &amp; final" in html


def test_conventions_are_stated(report: AuditReport, html: str) -> None:
    text = re.sub(r"<[^>]+>", "", html)
    for sentence in (
        "The unit is the document",
        "95 % percentile bootstrap intervals",
        "largest true-positive rate whose false-positive rate is at most the target",
        "No guarantee is claimed",
        "max(AUC, 1 &minus; AUC)",
        report.created,
        "sotu, 60 members and 60 non-members",
    ):
        assert sentence in text


def test_figures_are_those_of_the_data(html: str) -> None:
    # The attacks, the trade-off, s(t) of the two models with a reference, one run's selection, loss gap and Ref AUC.
    assert Page(html).figures == len(ATTACK_NAMES) + 1 + 2 + 1 + 2
    assert "Left out" not in html


def test_what_makes_the_figures_doubtful_comes_first(report: AuditReport) -> None:
    assert report.checks is not None
    assert "Checks of this audit" in render_html(report)
    warned = report.checks.model_copy(update={"warnings": ["a bag of words <tells> them apart"]})
    page = render_html(report.model_copy(update={"checks": warned}))
    assert "These figures are doubtful" in page
    assert "a bag of words &lt;tells&gt; them apart" in page
    assert page.index("a bag of words &lt;tells") < page.index('<ul class="verdicts">') < page.index('<table id="auc">')


def test_sections_without_data_are_sentences_not_empty_plots(report: AuditReport) -> None:
    row = report.rows[2].model_copy(update={"regurgitation": None})  # no reference
    bare = AuditReport(title="bare", created="now", rows=[row], settings=report.settings)
    page = Page(render_html(bare))
    html = render_html(bare)
    assert page.figures == len(row.attacks) == 4
    assert len(page.tables) == 2 + 2 + 1 + 2
    for sentence in (
        "Left out: no reference model was given to the audit.",
        "Left out: no training log with selected tokens was given.",
        "Left out: no loss gap or attack AUC over training steps was given.",
        "Left out: no configuration was given.",
    ):
        assert sentence in html
    assert 'id="versions"' not in html


def test_a_diverged_model_is_shown(report: AuditReport) -> None:
    row = report.rows[0].model_copy(update={"perplexity_members": float("inf")})
    page = Page(render_html(report.model_copy(update={"rows": [row]})))
    assert page.named("auc")[0][1][2] == "inf"
    assert page.named("summary")[0][1][6].endswith("training inf")


def test_the_first_table_has_one_row_per_model_and_says_what_was_not_tested(large_report: AuditReport) -> None:
    whole = Page(render_html(large_report)).named("summary")[0]
    assert [line[0] for line in whole[1:]] == [row.name for row in large_report.rows]
    assert "not tested" not in str(whole)
    first = large_report.rows[0]
    assert whole[1][1:] == [
        "Leak found" + "also: groups, passages, canaries, epsilon, collections",
        ".95 [.91, 1.00]Ref",
        "45\u00a0% [44, 46]Ref",
        "1.00 [.91, 1.00]9f2c61d0, 14 documents",
        "15\u00a0% of members0\u00a0% of non-members; 35\u00a0% of canaries' secrets",
        f"{first.perplexity_non_members:.1f}training {first.perplexity_members:.1f}",
    ]
    bare: dict[str, object] = {"strongest_tpr": [], "groups": None, "regurgitation": None}
    rows = [first.model_copy(update=bare), first.model_copy(update={**bare, "canaries": None, "name": "older"})]
    table = Page(render_html(large_report.model_copy(update={"rows": rows}))).named("summary")[0]
    assert [line[3:6] for line in table[1:]] == [
        ["not tested", "not tested", "35\u00a0% of canaries' secrets"],
        ["not tested", "not tested", "not tested"],
    ]


def test_what_other_tests_found_is_in_their_tables(large_report: AuditReport) -> None:
    page = Page(render_html(large_report))
    first = large_report.rows[0]
    (groups,), (passages,), (costs,), (continued,), (bounds,) = map(
        page.named, ("groups", "regurgitation", "costs", "continuations", "bounds")
    )
    assert groups[1][:4] == [first.name, "80", "80", ".951 Ref[.851, 1.000]"]
    assert groups[1][4:] == ["9f2c61d0", "14", "1.000 Ref[.910, 1.000]", ".010", ".200"]
    assert passages[1] == [first.name, "50", ".151[.131, .200]", ".000[.000, .009]"]
    assert costs[1:3] == [
        [first.name, "20", "418", "1.0", "418", "n/a"],
        [first.name, "50", "418", "2.5", "418", "n/a"],
    ]
    assert continued[1] == [first.name, "32", "64", ".250[.150, .350]; 12.5, 64", ".000[.000, .170]; 3, 9"]
    assert bounds[1] == [first.name, "f_dp", "0", "1.25", "40 of 50, Ref"]


def test_hashes_versions_and_the_gate_are_shown(large_report: AuditReport) -> None:
    page = render_html(large_report)
    for name, digest in large_report.hashes.items():
        assert f'<dt>SHA-256 of {name}</dt><dd class="hash">{digest}</dd>' in page
    assert "torch 2.13.0" in page
    assert "Gate not passed" in page
    assert page.count("<td>above</td>") == len(large_report.rows)
    assert "not recorded by the version" in render_html(large_report.model_copy(update={"hashes": {}}))


def test_a_report_of_before_0_2_is_read_under_the_present_names(report: AuditReport, tmp_path: Path) -> None:
    settings = replace(report.settings, members="auxiliary", attacks=("loss", "neighborhood"))
    now = report.model_copy(update={"settings": settings})
    old = now.model_dump_json()
    names = {
        "reruns": "passes",
        "neighbors": "neighbours",
        "neighbor_share": "neighbour_share",
        "memorized": "memorised",
    }
    for present, earlier in {**names, "neighborhood": "neighbourhood", "auxiliary": "probe"}.items():
        assert f'"{present}"' in old
        old = old.replace(f'"{present}"', f'"{earlier}"')
    (tmp_path / "report.json").write_text(old)
    assert load_report(tmp_path / "report.json") == now
