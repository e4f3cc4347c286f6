"""The picture of what was kept says what it is given."""

from __future__ import annotations

import re

from lrc.report.plots.kept import Row, kept
from lrc.report.plots.theme import MUTED, SERIES


def words(picture: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture)


def filled(picture: str, colour: str) -> list[tuple[float, float]]:
    """Width and height of the shapes that are filled with a colour."""
    shapes = re.findall(r'<path d="([^"]*)"[^>]*style="fill: ([^";]*)', picture)
    found = []
    for path, fill in shapes:
        if colour in fill:
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", path)]
            xs, ys = numbers[::2], numbers[1::2]
            found.append((max(xs) - min(xs), max(ys) - min(ys)))
    return found


def test_bars_are_as_high_as_what_is_kept() -> None:
    rows = [Row("qk", [0.5, 0.25, 1.0], ["a3", "a3", None], "4–8"), Row("embed", [0.75], ["a3"], "16")]
    picture = kept("kept", rows)
    assert {"qk", "embed", "4–8", "16", "layer"} <= set(words(picture))
    (_, half), (_, quarter), (wide, three) = filled(picture, SERIES[0])
    ((narrow, whole),) = [bar for bar in filled(picture, MUTED) if bar[1] > 1]
    assert [round(height / whole, 3) for height in (half, quarter, three)] == [0.5, 0.25, 0.75]
    assert wide > 3 * narrow


def test_methods_are_told_apart_where_there_are_several() -> None:
    rows = [Row("qk", [0.5, 0.25], ["a3", "svd"], "4–8")]
    assert {"a3", "svd"} <= set(words(kept("kept", rows)))
    assert "a3" not in words(kept("kept", [Row("qk", [0.5, 0.25], ["a3", "a3"], "4–8")]))


def test_many_layers_are_ticked_sparsely() -> None:
    picture = kept("kept", [Row("mlp", [0.5] * 80, ["a3"] * 80, "9")])
    numbers = [int(word) for word in words(picture) if word.isdigit() and word != "9"]
    assert numbers == list(range(0, 80, 8))
