"""The theme of pictures: text that stays text, colours that follow the page, the same bytes each time."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from lrc.report.plots.theme import (
    COLOURS,
    HEAT,
    INK,
    SERIES,
    css,
    drawing,
    standalone,
    svg,
)


def drawn(name: str) -> str:
    with drawing(300, 200) as figure:
        axes = figure.subplots()
        for i, colour in enumerate(SERIES):
            axes.plot([1, 10, 2000], [i + 1, i + 2, i], color=colour, marker="o", label=f"<{i}> & $x_1$ 名")
        axes.pcolormesh([[0.0, 1.0]], cmap=HEAT)
        axes.legend()
        axes.set_xticks([1, 10, 1000], ["1", "10", "1k"])
        return svg(figure, name, 'what "it" <shows>')


def test_the_same_picture_has_the_same_bytes_and_ids_of_its_own() -> None:
    first, other = drawn("first"), drawn("other")
    assert first == drawn("first")
    ids = [set(re.findall(r'\bid="([^"]+)"', picture)) for picture in (first, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert all(f'id="{used}"' in first for used in re.findall(r"#([a-z]\w{9,})", first))
    assert "<metadata" not in first
    assert "<style" not in first


def test_text_stays_text_and_is_escaped() -> None:
    picture = ElementTree.fromstring(drawn("text"))
    words = ["".join(text.itertext()) for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "<0> & $x_1$ 名" in words
    assert {"1", "10", "1k"} <= set(words)
    assert picture.get("aria-label") == 'what "it" <shows>'
    assert picture.get("viewBox") == "0 0 300 200"


def test_every_colour_is_a_property_of_the_page() -> None:
    picture = drawn("colours")
    known = {light: name for name, (light, _) in COLOURS.items()}
    assert len(known) == len(COLOURS)
    for before, colour in re.findall(r"(.{0,14})(#[0-9a-f]{6})\b", picture):
        assert before.endswith(f"--{known[colour]}, "[-14:]), (before, colour)
    assert f"var(--ink, {INK})" in picture


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("kind", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_the_paper(kind: int) -> None:
    shade = {name: shades[kind] for name, shades in COLOURS.items()}
    for name, colour in shade.items():
        if name.startswith("series-"):
            assert contrast(colour, shade["paper"]) >= 3, name
    assert contrast(shade["ink"], shade["paper"]) >= 10
    assert contrast(shade["muted"], shade["paper"]) >= 4.5
    assert contrast(shade["ink"], shade["heat"]) >= 4.5


def test_a_file_of_its_own_defines_what_it_uses() -> None:
    text = standalone(drawn("alone"))
    ElementTree.fromstring(text.encode())
    assert set(re.findall(r"var\(--([\w-]+)", text)) <= set(re.findall(r"--([\w-]+):", css("svg")))
    assert "prefers-color-scheme: dark" in text


def test_nothing_global_is_left_behind() -> None:
    before = dict(matplotlib.rcParams)
    drawn("global")
    assert dict(matplotlib.rcParams) == before
