"""Pictures of an inspection: what they say in words, and how many lines and cells they draw."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

from lrc.report.plots.estimates import estimates
from lrc.report.plots.rank_map import rank_map
from lrc.report.plots.spectrum import Curve, spectra

CURVE = Curve(8, [1, 4, 8], [0.5, 0.91, 1.0])


def words(picture: str) -> list[str]:
    tree = ElementTree.fromstring(picture)
    return ["".join(text.itertext()) for text in tree.iter("{http://www.w3.org/2000/svg}text")]


def strokes(picture: str, series: int) -> int:
    """Lines in the colour of a series, those of the legend among them."""
    tree = ElementTree.fromstring(picture)
    paths = tree.iter("{http://www.w3.org/2000/svg}path")
    return sum(
        f"stroke: var(--series-{series}," in path.get("style", "") and "fill: none" in path.get("style", "")
        for path in paths
    )


def test_a_curve_is_the_error_of_stopping_at_a_rank() -> None:
    at, error = CURVE.points
    assert at == [1 / 8, 0.5, 1.0]
    assert error == [math.sqrt(0.5), math.sqrt(1 - 0.91), 0.0]


def test_spectra_have_a_panel_a_target_and_a_line_a_layer_and_kind() -> None:
    picture = spectra(
        "s", [("q", [CURVE] * 3, [CURVE] * 3), ("mlp", [CURVE], [CURVE]), ("k", [CURVE], [CURVE])]
    )
    found = words(picture)
    assert {"q", "mlp", "k", "plain", "whitened", "relative error"} <= set(found)
    assert [strokes(picture, series) for series in (1, 2)] == [3 + 1 + 1 + 1] * 2
    assert picture == spectra(
        "s", [("q", [CURVE] * 3, [CURVE] * 3), ("mlp", [CURVE], [CURVE]), ("k", [CURVE], [CURVE])]
    )


def test_the_map_has_a_number_for_every_cell_that_there_is() -> None:
    picture = rank_map("r", ["q", "up"], [0, 3], {(0, "q"): 0.5, (0, "up"): 1.0, (3, "q"): 0.07})
    found = words(picture)
    assert {"q", "up", "0", "3", "layer", ".50", "1", ".07"} <= set(found)
    assert len([word for word in found if word.startswith(".") or word == "1"]) == 3
    many = rank_map("r", ["q"], list(range(80)), {(i, "q"): 0.5 for i in range(80)})
    assert "0" in words(many)
    assert "1" not in words(many)  # every second layer is named


def test_estimates_have_a_line_a_method() -> None:
    panels = [
        ("q", {"svd": [(0.4, 0.3), (0.6, 0.2)], "whitened_svd": [(0.4, 0.2), (0.6, 0.1)]}),
        ("qk, nats KL", {"a3": [(0.5, 0.01)]}),
    ]
    picture = estimates("e", panels, "predicted error")
    assert {"q", "qk, nats KL", "svd", "whitened_svd", "a3", "predicted error"} <= set(words(picture))
    assert strokes(picture, 1) >= 2
    assert strokes(picture, 2) >= 2


def test_marks_of_estimates_are_whole() -> None:
    tree = ElementTree.fromstring(estimates("e", [("q", {"svd": [(0.4, 0.3), (1.0, 0.0)]})], "error"))
    svg = "{http://www.w3.org/2000/svg}"
    clipped = [each for each in tree.iter() if each.get("clip-path")]
    assert clipped  # the lines of the grid are
    assert not [use for each in clipped for use in each.iter(f"{svg}use")]
    assert len([use for use in tree.iter(f"{svg}use") if "--series-1" in use.get("style", "")]) >= 2
