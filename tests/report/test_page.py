"""report.html: complete, self-contained, and a page in a browser."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from iapt.cli import report
from iapt.report.cells import gather
from iapt.report.page import html
from iapt.report.runs import read_runs
from iapt.report.sheet import Entry, Sheet, main_sheet
from tests.report.folders import make_failed, make_sweep

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps the tables' texts and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data.strip()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    sweep = make_sweep(tmp_path / "sweep")
    make_failed(sweep / "99", method="bitfit")
    report.run([str(sweep), "--baseline", "lora", "--out", str(tmp_path / "out")])
    return tmp_path / "out" / "report.html"


def test_well_formed_complete_and_self_contained(written: Path):
    text = written.read_text()
    page = Page(text)
    sheet = main_sheet(gather(read_runs([written.parent.parent / "sweep"]))[0], ["median"])
    table, differences = page.tables
    assert [line[:2] for line in differences[1:]] == [["iapt", "toy/entailment"], ["iapt", "toy/sentiment"]]
    assert table[0] == sheet.header
    expected = [[entry.text for entry in line] for line in sheet.lines]
    assert [[cell.rstrip("+") for cell in line] for line in table[1:]] == expected
    assert table[2][1].endswith("+"), "iapt on entailment"
    assert "bitfit" in table[3][0]
    assert table[3][1].startswith("failed")

    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(images) == 5
    for image in images:
        kind, data = image.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert [
        v for t, n, v in page.attributes if n in ("src", "href", "srcset", "action") and not v.startswith("data:")
    ] == []
    without_pictures = re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert not re.search(r"https?:|//|@import|url\(|<script|<link", without_pictures)
    assert "not drawn: Test value by number of soft tokens" in text
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    assert all(value for tag, name, value in page.attributes if (tag, name) == ("img", "alt"))


def test_a_value_stands_apart_from_what_is_said_of_its_seeds():
    entries = [Entry("lora (r=8, x)"), Entry("71.0 (std 2.3, n 5) [1]", True, "+"), Entry("failed [2]")]
    text = html("T", [Sheet("t", "t", ["method", "a", "b"], [entries])], [], [])
    Page(text)
    assert '<td class="text">lora (r=8, x)</td>' in text
    assert (
        '<td class=" best">71.0<sup title="better">+</sup><br><small>(std 2.3,</small> <small>n 5) [1]</small> </td>'
    ) in text
    assert '<td class="">failed [2]</td>' in text


def test_panels_of_all_plots_are_of_one_size(written: Path):
    page = Page(written.read_text())
    widths = [int(value) for tag, name, value in page.attributes if (tag, name) == ("img", "width")]
    # Two tasks beside each other, or two layers.
    assert widths == [756, 756, 756, 504, 504]


def test_names_are_text_not_markup():
    sheet = Sheet("t", "<i>", ["a"], [[Entry('<script>alert(1)</script> & "x"')]], ["</ul>"])
    page = Page(html("T", [sheet], [], ["<folder>"]))
    assert page.tables == [[["a"], ['<script>alert(1)</script> & "x"']]]


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshot(written: Path, tmp_path: Path, scheme: str):
    picture = tmp_path / "page.png"
    browse(written, tmp_path, f"--screenshot={picture}", "--window-size=1200,1600", scheme)
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape[:2] == (1600, 1200)
    corner, text = pixels[2, 2].mean(), pixels[:200].mean(-1)
    assert corner > 0.9 if scheme == "light" else corner < 0.2
    darkest, brightest = text.min(), text.max()
    assert brightest - darkest > 0.6, "the heading is readable on its background"
    # A learned-activation curve or a learning curve: pixels in the first colour of the plots, #0072b2.
    assert (abs(pixels - (0, 0x72 / 255, 0xB2 / 255)).max(-1) < 0.1).sum() > 100


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
def test_nothing_runs_out_of_a_phones_screen(written: Path, tmp_path: Path):
    copy = tmp_path / "phone.html"
    measure = "<script>document.title = document.documentElement.scrollWidth + '/' + innerWidth</script>"
    copy.write_text(written.read_text().replace("</body>", measure + "</body>"))
    found = re.search(
        r"<title>(\d+)/(\d+)</title>", browse(copy, tmp_path, "--dump-dom", "--window-size=390,800", "light")
    )
    assert found
    assert 0 < int(found[1]) <= int(found[2]) <= 600


def browse(page: Path, scratch: Path, action: str, size: str, scheme: str) -> str:
    assert BROWSER
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size, action,
        f"--user-data-dir={scratch / 'profile'}", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        page.absolute().as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
