"""The report in a real browser: what a reader sees, not what the template says."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import matplotlib.image
import numpy as np
import pytest

from dualtok.audit.attacks.registry import names_of
from dualtok.audit.report.tables import interval, share
from dualtok.audit.report.write import write_report
from tests.audit.conftest import ATTACK_NAMES

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.audit.report.data import AuditReport

ONE_PASS = names_of("single_pass", "joint")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium found; the Debian package chromium has one (apt-get install chromium)"
)
WIDTH, HEIGHT = 1280, 7200
SCREENS = ((1400, 900), (1024, 768), (390, 844))
# 0 is dark, 1 is light in Chromium's enumeration of preferred colour schemes.
PREFERRED = {"dark": "--blink-settings=preferredColorScheme=0", "light": "--blink-settings=preferredColorScheme=1"}
LEAST_CONTRAST = 4.5
"""Of text against its background: WCAG 2.2, success criterion 1.4.3, level AA."""
# A frame is as wide as it is told to be, which a window is not, and its page is the report as it is: the script that
# measures is the frame's. The scheme is the frame's own as well, so it says that it knows both.
HARNESS = """<!doctype html><html style="color-scheme: light dark"><body>
<iframe src="{address}" style="width: {width}px; height: {height}px; border: 0"></iframe>
<pre id="measured"></pre>
<script>
{script}
onload = () => {
  const frame = document.querySelector("iframe").contentWindow;
  document.getElementById("measured").textContent = JSON.stringify(measure(frame, frame.document));
};
</script></body></html>"""


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={profile}",
        f"--window-size={WIDTH},{HEIGHT}",
        *options,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def opened(page: Path) -> str:
    """Return a page with all that is folded unfolded, but for the enlarged curves."""
    return page.read_text(encoding="utf-8").replace('<details class="fold"', '<details open class="fold"')


def measured(
    page: Path, folder: Path, script: str, *, screen: tuple[int, int] = SCREENS[0], scheme: str = "light"
) -> Any:
    """Return what a JavaScript function ``measure(window, document)`` returns of a page on a screen."""
    folder.mkdir(exist_ok=True)
    harness = folder / "harness.html"
    values = {"{address}": page.as_uri(), "{width}": str(screen[0]), "{height}": str(screen[1]), "{script}": script}
    text = HARNESS
    for name, value in values.items():
        text = text.replace(name, value)
    harness.write_text(text, encoding="utf-8")
    done = browse(harness, folder / "profile", "--allow-file-access-from-files", "--dump-dom", PREFERRED[scheme])
    assert console(done) == []
    found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found is not None
    return json.loads(html.unescape(found[1]))


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Messages that the page left in the browser's console: errors, refused or failed requests."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(report: AuditReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(report, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def large(large_report: AuditReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(large_report, tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module")
def small(small_report: AuditReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(small_report, tmp_path_factory.mktemp("small"))


def test_the_loaded_page_shows_every_figure_without_a_complaint(
    report: AuditReport, page: Path, tmp_path: Path
) -> None:
    done = browse(page, tmp_path, "--dump-dom")
    assert console(done) == []
    dom = done.stdout
    assert dom.rstrip().endswith("</html>")
    table = dom[dom.index('<table id="auc">') :]
    rows = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")], flags=re.DOTALL)
    assert len(rows) == 1 + len(report.rows)
    for row, line in zip(report.rows, rows[1:], strict=True):
        cells = [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", line, flags=re.DOTALL)]
        expected = [result and share(result.auc.value) + interval(result.auc) for result in map(row.attack, ONE_PASS)]
        assert cells[3:] == [cell or "n/a" for cell in expected]
    # The HTML parser kept the drawings as drawings: nothing was torn out of an <svg>.
    drawings = re.findall(r"<svg[^>]*role=\"img\".*?</svg>", dom, flags=re.DOTALL)
    assert len(drawings) == len(ATTACK_NAMES) + 6
    assert all("<path" in drawing and "<text" in drawing for drawing in drawings)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_painted_in_light_and_dark(page: Path, tmp_path: Path, scheme: str) -> None:
    picture = tmp_path / "page.png"
    unfolded = tmp_path / "unfolded.html"
    unfolded.write_text(opened(page), encoding="utf-8")
    browse(unfolded, tmp_path / "profile", f"--screenshot={picture}", PREFERRED[scheme])
    pixels = (matplotlib.image.imread(picture)[..., :3] * 255).round().astype(np.uint8)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, counts = np.unique(packed, return_counts=True)
    assert len(colours) > 200
    paper, panel = {"light": (0xFFFFFF, 0xF6F8FA), "dark": (0x14181D, 0x1B2128)}[scheme]
    assert packed[0, 0] == paper
    assert colours[counts.argmax()] in (paper, panel)
    assert 0.5 < counts[np.isin(colours, (paper, panel))].sum() / counts.sum() < 0.97
    # The first curve's colour, which only the style sheet knows: variables do reach the drawings.
    curve = {"light": 0x0072B2, "dark": 0x58B4F0}[scheme]
    assert counts[colours == curve].sum() > 500


def test_a_request_to_outside_would_be_noticed(page: Path, tmp_path: Path) -> None:
    leaky = tmp_path / "leaky.html"
    text = page.read_text(encoding="utf-8")
    leaky.write_text(text.replace("</main>", '<img src="http://127.0.0.1:9/x.png"></main>'), encoding="utf-8")
    complaints = console(browse(leaky, tmp_path / "profile", "--dump-dom"))
    assert complaints
    assert "Content Security Policy" in complaints[0]


# What lies beside the screen, folded and unfolded: the page itself, boxes that scroll, and tables in none.
LAYOUT = """
const held = (one) => one.parentElement.closest(".scroll") !== null;
const boxes = (document) => [...document.querySelectorAll("table, .scroll, .panel, pre, dl, p, ul")]
  .filter((one) => one.checkVisibility() && !held(one))
  .map((one) => ({name: one.id || one.className || one.tagName, box: one.getBoundingClientRect()}))
  .map(({name, box}) => ({name, left: box.left, right: box.right}));
const page = (window, document) =>
  ({inner: window.innerWidth, scrolls: document.documentElement.scrollWidth, boxes: boxes(document)});
function measure(window, document) {
  const folded = page(window, document);
  document.querySelectorAll("details.fold").forEach((one) => one.open = true);
  return [folded, page(window, document)];
}
"""


@pytest.mark.parametrize("screen", [*SCREENS, (810, 1080)], ids=str)  # the last just before the tables are stacked
@pytest.mark.parametrize("which", ["large", "small"])
def test_nothing_lies_beside_the_screen(
    request: pytest.FixtureRequest, tmp_path: Path, which: str, screen: tuple[int, int]
) -> None:
    folded, unfolded = measured(request.getfixturevalue(which), tmp_path, LAYOUT, screen=screen)
    assert len(unfolded["boxes"]) > len(folded["boxes"]) >= 10
    for page in (folded, unfolded):
        assert page["inner"] == screen[0]
        assert page["scrolls"] <= screen[0]
        assert [box for box in page["boxes"] if box["left"] < 0 or box["right"] > screen[0] + 0.5] == []


@pytest.mark.parametrize("screen", [SCREENS[0], SCREENS[2]], ids=str)
def test_the_first_screen_holds_all_verdicts(
    large_report: AuditReport, large: Path, tmp_path: Path, screen: tuple[int, int]
) -> None:
    script = """
    const measure = (window, document) => [...document.querySelectorAll(".verdicts li")].map((line) => ({
      bottom: line.getBoundingClientRect().bottom, text: line.innerText, word: line.querySelector(".badge").innerText,
      colour: window.getComputedStyle(line.querySelector(".badge")).color}));
    """
    lines = measured(large, tmp_path, script, screen=screen)
    assert len(lines) == len(large_report.rows) == 8
    assert all(line["bottom"] <= screen[1] for line in lines)
    for line, row in zip(lines, large_report.rows, strict=True):
        assert row.name in line["text"]
    # A word beside each color: what differs in color differs in words.
    assert {line["word"] for line in lines} == {"Leak found", "No leak found"}
    assert len({(line["word"], line["colour"]) for line in lines}) == 2


@pytest.mark.parametrize("screen", SCREENS, ids=str)
def test_the_names_of_the_models_stay_while_a_table_scrolls(
    large: Path, tmp_path: Path, screen: tuple[int, int]
) -> None:
    script = """
    function measure(window, document) {
      document.querySelectorAll("details.fold").forEach((one) => one.open = true);
      const wide = [...document.querySelectorAll(".scroll")].filter((box) => box.scrollWidth > box.clientWidth + 1);
      return wide.map((box) => {
        box.scrollLeft = box.scrollWidth;
        const left = box.getBoundingClientRect().left;
        const rows = [...box.querySelectorAll("tr")];
        return {id: box.querySelector("table").id, scrolled: box.scrollLeft,
          shifts: rows.map((row) => row.children[0].getBoundingClientRect().left - left),
          clear: rows.filter((row) => window.getComputedStyle(row.children[0]).backgroundColor.includes("rgba")).length,
          last: rows.map((row) => row.lastElementChild.getBoundingClientRect().right - left - box.clientWidth)};
      });
    }
    """
    tables = measured(large, tmp_path, script, screen=screen)
    assert {"auc", "two-sided"} <= {table["id"] for table in tables}
    for table in tables:
        assert table["scrolled"] > 0
        assert max(map(abs, table["shifts"])) < 1
        assert table["clear"] == 0  # figures that pass below a name do not show through it
        assert max(table["last"]) < 1  # the last column can be reached


CONTRAST = """
const channels = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
const linear = (c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
const luminance = (rgb) => rgb.slice(0, 3).map((c) => linear(c / 255))
  .reduce((sum, c, index) => sum + c * [.2126, .7152, .0722][index], 0);
function behind(window, element) {
  let seen = [0, 0, 0], left = 1;
  for (let one = element; one !== null && left > 0; one = one.parentElement) {
    const [r, g, b, a] = channels(window.getComputedStyle(one).backgroundColor);
    seen = seen.map((c, index) => c + left * a * [r, g, b][index]);
    left *= 1 - a;
  }
  return seen;
}
function measure(window, document) {
  document.querySelectorAll("details").forEach((one) => one.open = true);
  const found = {};
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || element.getBoundingClientRect().width === 0) continue;
    const style = window.getComputedStyle(element);
    const drawn = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [light, dark] = [luminance(channels(drawn)), luminance(behind(window, element))].sort((a, b) => b - a);
    const ratio = (light + .05) / (dark + .05);
    const kind = `${element.tagName}.${element.className.baseVal ?? element.className}`;
    found[kind] = Math.min(found[kind] ?? 99, ratio);
  }
  return found;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_against_its_background(large_report: AuditReport, tmp_path: Path, scheme: str) -> None:
    checks = large_report.checks
    assert checks is not None
    warned = checks.model_copy(update={"warnings": ["5 % of the non-members are members"]})
    page = write_report(large_report.model_copy(update={"checks": warned}), tmp_path / "report")
    ratios = measured(page, tmp_path, CONTRAST, scheme=scheme)
    assert {"text.", "SPAN.badge leak", "SPAN.badge none", "LI.", "B.", "SMALL.", "DT.", "A."} <= set(ratios)
    assert {kind: ratio for kind, ratio in ratios.items() if ratio < LEAST_CONTRAST} == {}


def test_every_drawing_has_a_name_or_is_none_to_a_screen_reader(
    large_report: AuditReport, large: Path, tmp_path: Path
) -> None:
    script = """
    const measure = (window, document) => [...document.querySelectorAll("svg")].map((svg) =>
      [svg.getAttribute("role"), svg.getAttribute("aria-label") ?? "", svg.getAttribute("aria-hidden")]);
    """
    drawings = measured(large, tmp_path, script)
    named = [name for role, name, hidden in drawings if role == "img" and hidden is None]
    assert len(named) == len(set(named)) > len(large_report.rows[0].attacks) + 8 + 8 >= 24 + 16
    assert all(len(name) > 20 for name in named)
    assert all(hidden == "true" for role, _, hidden in drawings if role != "img")


def test_parts_unfold_and_curves_grow_by_a_click(large: Path, tmp_path: Path) -> None:
    script = """
    function measure(window, document) {
      const folds = [...document.querySelectorAll("details.fold:not(details details)")];
      const height = (one) => one.getBoundingClientRect().height;
      const steps = folds.map((one) => {
        const closed = height(one); one.firstElementChild.click();
        const open = height(one); one.firstElementChild.click();
        return [closed, open, height(one)];
      });
      document.querySelector("#roc > summary").click();
      const [first, second] = document.querySelectorAll("#roc .panel");
      const widths = () => [first, second].map((one) => one.querySelector("svg").getBoundingClientRect().width);
      const curves = [widths()];
      for (const one of [first, second, second]) { one.firstElementChild.click(); curves.push(widths()); }
      return {steps, curves};
    }
    """
    for screen in (SCREENS[0], SCREENS[2]):
        found = measured(large, tmp_path, script, screen=screen)
        assert len(found["steps"]) > 10
        for closed, unfolded, again in found["steps"]:
            assert closed == again
            assert closed < 110
            assert unfolded > closed + 20
        small, one, other, none = found["curves"]
        assert small == none
        assert small[0] == pytest.approx(small[1], abs=1)
        assert one[0] > 1.8 * small[0]
        assert other[1] > 1.8 * small[1]
        assert [one[1], other[0]] == pytest.approx(small, abs=1)  # one is large at a time


def test_in_print_folded_parts_stay_closed(large: Path, tmp_path: Path) -> None:
    unfolded = tmp_path / "unfolded.html"
    unfolded.write_text(opened(large), encoding="utf-8")
    pages = []
    for number, page in enumerate((large, unfolded)):
        printed = tmp_path / f"{number}.pdf"
        browse(page, tmp_path / "profile", f"--print-to-pdf={printed}", "--no-pdf-header-footer")
        pages.append(len(re.findall(rb"/Type /Page\b", printed.read_bytes())))
    assert pages[0] == pages[1] <= 5
