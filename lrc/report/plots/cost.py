"""What quality costs: perplexity against bytes, an output a point, with the front that none of them is below."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lrc.report.plots.theme import (
    INK,
    MUTED,
    PAPER,
    PHONE,
    compact,
    drawing,
    log_scale,
    mark,
    shortened,
    svg,
)

_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


@dataclass(frozen=True)
class Point:
    """A model of so many ``bytes`` with its ``perplexity``; ``kind`` is its method, or None for the dense model."""

    label: str
    bytes: int
    perplexity: float
    kind: str | None


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other is both at most as large as and at most as perplexed as, by bytes; equal ones once."""
    best, found = math.inf, []
    for point in sorted(points, key=lambda point: (point.bytes, point.perplexity)):
        if point.perplexity < best:
            best = point.perplexity
            found.append(point)
    return found


def cost(name: str, text: str, points: Sequence[Point], kinds: Sequence[str], width: float = PHONE) -> str:
    """The picture of one text; ``kinds`` in the order of their colours, which pictures beside each other share.

    Points whose perplexity is not finite are left out, as an axis has no place for them.
    """
    shown = [point for point in points if math.isfinite(point.perplexity) and point.perplexity > 0]
    with drawing(width, 0.78 * width) as figure:
        axes = figure.subplots()
        axes.set_title(f"perplexity on {shortened(text, 28)}")
        edge = front(shown)
        axes.plot([p.bytes for p in edge], [p.perplexity for p in edge], color=MUTED, linewidth=1, zorder=1.5)
        for i, kind in enumerate(kinds):
            if of_kind := [point for point in shown if point.kind == kind]:
                _marks(axes, of_kind, *mark(i), kind)
        _marks(axes, [point for point in shown if point.kind is None], INK, "*", "dense")
        _scales(axes, shown)
        if len(kinds) > 1:
            axes.legend(
                ncols=min(len(kinds) + 1, 3),
                loc="upper left",
                bbox_to_anchor=(-0.02, -0.18),
                handletextpad=0.3,
                columnspacing=1.2,
            )
        _label(figure, axes, shown, edge)
        return svg(
            figure, name, f"Perplexity on {text} against the bytes of the weights, {len(shown)} models"
        )


def _marks(axes: Axes, points: Sequence[Point], colour: str, marker: str, label: str) -> None:
    axes.plot(
        [point.bytes for point in points],
        [point.perplexity for point in points],
        linestyle="none",
        marker=marker,
        markersize=11 if marker == "*" else 7,
        markeredgecolor=PAPER,
        markeredgewidth=1,
        color=colour,
        label=label,
        clip_on=False,
        zorder=3,
    )


def _scales(axes: Axes, points: Sequence[Point]) -> None:
    """Bytes from nothing on, in a unit of their size; perplexity by ratios where it spans many."""
    most = max((point.bytes for point in points), default=1)
    size, unit = next(each for each in _UNITS if most >= each[0])
    axes.set_xlim(0, 1.08 * most)
    ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(0, most / size)
    axes.set_xticks([tick * size for tick in ticks if tick * size <= 1.08 * most])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / size:g}"))
    axes.set_xlabel(f"weights, {unit}", loc="right")
    values = [point.perplexity for point in points] or [1.0]
    low, high = min(values), max(values)
    if high > 3 * low:
        log_scale(axes, "y")
        axes.set_ylim(low / 1.25, high * 1.25)
    else:
        room = 0.12 * (high - low) or 0.1 * high
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))


def _label(figure: Figure, axes: Axes, points: Sequence[Point], edge: Sequence[Point]) -> None:
    """Write each label at its point, or further off with a line to it, where it covers least of marks and labels."""
    figure.draw_without_rendering()  # what is laid out now stays where it is
    figure.set_layout_engine("none")
    inside = _Box(*axes.get_window_extent().extents)
    marks = [axes.transData.transform((point.bytes, point.perplexity)) for point in points]
    corners = [axes.transData.transform((point.bytes, point.perplexity)) for point in edge]
    taken = [_around(x, y, 6) for x, y in marks]
    for (x0, y0), (x1, y1) in pairwise(corners):  # the line between them, as beads
        steps = 1 + round(math.hypot(x1 - x0, y1 - y0) / 4)
        beads = [i / steps for i in range(steps + 1)]
        taken += [_around(x0 + t * (x1 - x0), y0 + t * (y1 - y0), 2) for t in beads]
    for point, (x, y) in zip(points, marks, strict=True):
        label = axes.annotate(
            shortened(point.label, 22),
            (point.bytes, point.perplexity),
            textcoords="offset pixels",
            xytext=(0, 0),
            fontsize=10,
            color=INK,
            annotation_clip=False,
        )
        size = label.get_window_extent()
        boxes = [(place, place.box(x, y, size.width, size.height)) for place in _PLACES]
        best, end = min(boxes, key=lambda each: _covered(each[1], taken, inside))  # the first of equals
        taken.append(end)
        label.set(position=(best.x, best.y), ha=best.ha, va=best.va)
        if best.far:
            to = min(max(x, end.x0), end.x1), min(max(y, end.y0), end.y1)
            (x0, y0), (x1, y1) = axes.transData.inverted().transform([(x, y), to])
            axes.plot([x0, x1], [y0, y1], color=MUTED, linewidth=0.6, zorder=2, clip_on=False)


class _Box(NamedTuple):
    x0: float
    y0: float
    x1: float
    y1: float

    def common(self, other: _Box) -> float:
        """The area of both."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return width * height if width > 0 and height > 0 else 0.0


class _Place(NamedTuple):
    """Pixels from a point to its label, the label's side that is there, and whether a line leads to it."""

    x: float
    y: float
    ha: Literal["left", "center", "right"]
    va: Literal["bottom", "center", "top"]
    far: bool

    def box(self, x: float, y: float, width: float, height: float) -> _Box:
        """Where a label of a size lies, of a point at (x, y)."""
        left, low = x + self.x - width * _SHARE[self.ha], y + self.y - height * _SHARE[self.va]
        return _Box(left, low, left + width, low + height)


_SHARE = {"left": 0.0, "bottom": 0.0, "center": 0.5, "right": 1.0, "top": 1.0}


def _places() -> Iterator[_Place]:
    """The best first."""
    for off, far in ((8, False), (20, True), (34, True), (50, True)):
        yield _Place(off, 0, "left", "center", far)
        yield _Place(0, off, "center", "bottom", far)
        yield _Place(-off, 0, "right", "center", far)
        yield _Place(0, -off, "center", "top", far)
        yield _Place(0.7 * off, 0.7 * off, "left", "bottom", far)
        yield _Place(-0.7 * off, -0.7 * off, "right", "top", far)
        yield _Place(0.7 * off, -0.7 * off, "left", "top", far)
        yield _Place(-0.7 * off, 0.7 * off, "right", "bottom", far)


_PLACES = tuple(_places())


def _around(x: float, y: float, half: float) -> _Box:
    return _Box(x - half, y - half, x + half, y + half)


def _covered(box: _Box, taken: Sequence[_Box], inside: _Box) -> float:
    """What a box covers of others, and, worse, of what is outside of the axes."""
    return sum(box.common(other) for other in taken) + 4 * (box.common(box) - box.common(inside))
