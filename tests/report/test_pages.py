"""Pages in a real browser: on a phone in dark and on a desk in light, nothing overflows, overlaps or is lost."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from lrc.records.compression import REPORT, Report
from lrc.report.compression import html_page
from lrc.report.outputs import compared_page, read_outputs

_A4 = 718  # pixels between margins of a centimetre


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    module = importlib.import_module("screenshots")
    if module.chromium() is None:
        pytest.skip("no chromium: apt-get install chromium, or name one in CHROMIUM")
    return module


@pytest.fixture(params=["report", "worst report", "no evaluation", "comparison"])
def page(
    request: pytest.FixtureRequest,
    make_report: Callable[..., Report],
    worst_page: str,
    many: list[Report],
    tmp_path: Path,
) -> Path:
    if request.param == "comparison":
        for i, report in enumerate(many):
            (tmp_path / f"llama-7b-{report.plan}-{i}").mkdir()
            (tmp_path / f"llama-7b-{report.plan}-{i}" / REPORT).write_text(report.to_json(), encoding="utf-8")
        text = compared_page(read_outputs(sorted(tmp_path.iterdir())))
    else:
        fields = {"perplexity": []} if request.param == "no evaluation" else {}
        text = worst_page if request.param == "worst report" else html_page(make_report(**fields))
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_overflows_or_overlaps(browser: ModuleType, page: Path, tmp_path: Path) -> None:
    # Layout depends on the width alone, and colours on the theme.
    for width, dark in ((browser.PHONE, True), (browser.DESKTOP, False)):
        seen = browser.look(page, width, dark=dark)
        assert seen.found == []
        assert (seen.width, seen.dark, seen.paper < 0.1) == (width, dark, dark)
        assert seen.texts > 10
    printed = tmp_path / "printed.html"  # on A4 within margins, as the rules for print have it
    printed.write_text(
        page.read_text(encoding="utf-8").replace("@media print", "@media all"), encoding="utf-8"
    )
    assert browser.look(printed, _A4).found == []
    shot = tmp_path / "shot.png"
    browser.screenshot(page, shot, browser.PHONE, 600)
    with Image.open(shot) as image:
        assert image.size == (browser.PHONE, 600)
        colours = image.convert("RGB").getcolors(2**16)
    assert colours is not None
    assert len(colours) > 8  # a page that was not drawn is of one


def test_what_overflows_or_overlaps_is_seen(browser: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        """<!doctype html><meta name="viewport" content="width=device-width"><body style="background: #fff">
        <p style="width: 800px">too wide a line</p>
        <svg viewBox="0 0 100 100" width="100" height="100">
        <text x="5" y="20" style="font-size: 12px">first</text><text x="8" y="22" style="font-size: 12px">second</text>
        <text x="5" y="60" style="font-size: 12px; fill: #eee">faint</text>
        <text x="5" y="80" style="font-size: 5px">small</text>
        <text x="90" y="50" style="font-size: 12px">outside</text></svg>
        <svg viewBox="0 0 100 100" width="200" height="200" data-picture="cut">
        <defs><path id="mark" d="M-4 -4H4V4H-4z"/>
        <clipPath id="panel"><rect x="20" y="20" width="60" height="60"/></clipPath></defs>
        <g clip-path="url(#panel)"><use href="#mark" x="50" y="50"/><use href="#mark" x="50" y="22"/></g></svg>
        </body>""",
        encoding="utf-8",
    )
    seen = browser.look(page, browser.PHONE).found
    assert len([each for each in seen if "is cut" in each]) == 1  # the other mark is whole
    found = " ".join(seen)
    for told in (
        "out of the page: P too wide a line",
        "on one another: text first and text second",
        "too faint: text faint",
        "too small: text small",
        "out of its picture: text outside",
        "a mark is cut in the picture cut",
    ):
        assert told in found
