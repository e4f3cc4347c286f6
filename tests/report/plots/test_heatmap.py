"""The heat map tells every figure, by colours of the page that grow with the loss."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

from lrc.report.ablation import percent
from lrc.report.plots.heatmap import heatmap

INCREASES = {"qk": [0.2, 0.5], "mlp": [-0.001, 41.0], "down": [math.nan, math.inf]}


def drawn() -> str:
    return heatmap(INCREASES, [0.5, 0.25], percent, title="Rise of $x", label="A & B")


def test_every_figure_stands_in_it_as_text() -> None:
    root = ElementTree.fromstring(drawn().encode())
    texts = ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]
    told = ["+20.0 %", "+50.0 %", "-0.1 %", "42x", "nanx", "infx"]
    for text in (*told, "qk", "mlp", "down", "0.5 (2x)", "0.25 (4x)", "Rise of $x"):
        assert text in texts
    assert root.attrib["aria-label"] == "A & B"


def test_colours_are_the_page_s_and_grow_with_the_loss() -> None:
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
