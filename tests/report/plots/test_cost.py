"""Perplexity against bytes: which points are on the front, and that all are drawn and named."""

from __future__ import annotations

import math
import re
import warnings

from lrc.report.plots.cost import Point, cost, front

DENSE = Point("dense", 100, 10.0, None)
SMALL, GOOD, BAD = (
    Point("small", 40, 20.0, "a3"),
    Point("good", 60, 12.0, "a3"),
    Point("bad", 60, 15.0, "svd"),
)
NONE = Point("none", 50, math.nan, "svd")


def words(picture: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture)


def test_the_front_is_what_nothing_beats() -> None:
    assert front([DENSE, BAD, GOOD, SMALL]) == [SMALL, GOOD, DENSE]
    assert front([DENSE, Point("better", 100, 9.0, "a3"), Point("same", 100, 9.0, "a3")]) == [
        Point("better", 100, 9.0, "a3")
    ]
    assert front([Point("worse", 200, 10.0, "a3"), DENSE]) == [DENSE]
    assert front([]) == []


def test_every_point_that_has_a_place_is_named() -> None:
    picture = cost("cost", "text", [DENSE, SMALL, GOOD, BAD, NONE], ["a3", "svd"])
    assert {"dense", "small", "good", "bad", "a3", "svd"} <= set(words(picture))
    assert "none" not in words(picture)


def test_a_long_name_keeps_its_two_ends() -> None:
    picture = cost(
        "cost", "/data/" + 40 * "x" + ".txt", [Point("begin-" + 60 * "y" + "-end", 9, 2.0, "a3")], ["a3"]
    )
    (label,) = [word for word in words(picture) if word.startswith("begin")]
    assert label.endswith("-end")
    assert len(label) == 22
    assert any(word.startswith("perplexity on /data/") and word.endswith(".txt") for word in words(picture))


def test_nothing_to_draw_is_an_empty_picture() -> None:
    assert "<svg" in cost("cost", "text", [NONE], ["svd"])


def test_a_name_that_the_measuring_font_has_not_is_written_and_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = cost("cost", "模型 😀", [DENSE, Point("配置", 40, 20.0, "a3")], ["a3"])
    assert "配置" in words(picture)
