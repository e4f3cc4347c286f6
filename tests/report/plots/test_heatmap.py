"""The heat map tells every figure, by colours of the page that grow with the shade."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from lrc.report.plots.heatmap import heatmap

SHADES = [[0.2, 0.4], [0.0, 0.9], [1.0, 1.0]]
TEXTS = [["+20 %", "+50 %"], ["-1 %", "42x"], ["nanx", "infx"]]


def drawn() -> str:
    rows, columns = ["qk", "mlp", "down"], ["0.5 (2x)", "0.25 (4x)"]
    return heatmap("h", SHADES, TEXTS, rows, columns, title="Rise of $x", below="kept", label="A & B")


def test_every_figure_stands_in_it_as_text() -> None:
    root = ElementTree.fromstring(drawn().encode())
    texts = ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]
    told = [text for row in TEXTS for text in row]
    for text in (*told, "qk", "mlp", "down", "0.5 (2x)", "0.25 (4x)", "Rise of $x", "kept"):
        assert text in texts
    assert root.attrib["aria-label"] == "A & B"


def test_colours_are_the_page_s_and_grow_with_the_shade() -> None:
    text = drawn()
    assert "<image" not in text
    fills = [
        float(o or 1) for o in re.findall(r"fill: var\(--heat, #\w+\)(?:; fill-opacity: ([\d.]+))?", text)
    ]
    assert len(fills) == 6
    small, larger, fell, large, *beyond = fills
    assert fell < small < larger < large < 1
    assert beyond == [1, 1]


def test_the_same_figures_give_the_same_bytes() -> None:
    assert drawn() == drawn()
