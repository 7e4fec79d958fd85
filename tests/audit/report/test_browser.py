"""The report in a real browser: what a reader sees, not what the template says."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

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
WIDTH, HEIGHT = 1280, 3600


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


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Messages that the page left in the browser's console: errors, refused or failed requests."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(report: AuditReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(report, tmp_path_factory.mktemp("report"))


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
    assert len(drawings) == len(ATTACK_NAMES) + 5
    assert all("<path" in drawing and "<text" in drawing for drawing in drawings)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_painted_in_light_and_dark(page: Path, tmp_path: Path, scheme: str) -> None:
    picture = tmp_path / "page.png"
    # 0 is dark, 1 is light in Chromium's enumeration of preferred colour schemes.
    preferred = f"--blink-settings=preferredColorScheme={'0' if scheme == 'dark' else '1'}"
    browse(page, tmp_path / "profile", f"--screenshot={picture}", preferred)
    pixels = (matplotlib.image.imread(picture)[..., :3] * 255).round().astype(np.uint8)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, counts = np.unique(packed, return_counts=True)
    assert len(colours) > 200
    background = colours[counts.argmax()]
    assert background == {"light": 0xFFFFFF, "dark": 0x14181D}[scheme]
    assert 0.5 < counts.max() / counts.sum() < 0.97
    # The first curve's colour, which only the style sheet knows: variables do reach the drawings.
    curve = {"light": 0x0072B2, "dark": 0x58B4F0}[scheme]
    assert counts[colours == curve].sum() > 500


def test_a_request_to_outside_would_be_noticed(page: Path, tmp_path: Path) -> None:
    leaky = tmp_path / "leaky.html"
    html = page.read_text(encoding="utf-8")
    leaky.write_text(html.replace("</main>", '<img src="http://127.0.0.1:9/x.png"></main>'), encoding="utf-8")
    complaints = console(browse(leaky, tmp_path / "profile", "--dump-dom"))
    assert complaints
    assert "Content Security Policy" in complaints[0]
