"""What quality costs: perplexity against bytes, an output a point, with the front that none of them is below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike

from lrc.report.plots.theme import (
    INK,
    MUTED,
    PAPER,
    PHONE,
    compact,
    drawing,
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


def cost(name: str, text: str, points: Sequence[Point], kinds: Sequence[str]) -> str:
    """The picture of one text; ``kinds`` in the order of their colours, which pictures beside each other share.

    Points whose perplexity is not finite are left out, as an axis has no place for them.
    """
    shown = [point for point in points if math.isfinite(point.perplexity) and point.perplexity > 0]
    with drawing(PHONE, 0.78 * PHONE) as figure:
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
        axes.set(yscale="log", ylim=(low / 1.25, high * 1.25))
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 60 * low else (1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        room = 0.12 * (high - low) or 0.1 * high
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))


def _label(figure: Figure, axes: Axes, points: Sequence[Point], edge: Sequence[Point]) -> None:
    """Write each label near its point, with a line to it, where it overlaps least of marks, labels and the front."""
    figure.draw_without_rendering()  # what is laid out now stays where it is
    figure.set_layout_engine("none")
    inside = axes.get_window_extent()
    at = axes.transData.transform
    taken = [_around(at((point.bytes, point.perplexity)), 6) for point in points]
    for start, end in pairwise(at([(point.bytes, point.perplexity) for point in edge]) if edge else []):
        steps = 1 + round(math.dist(start, end) / 4)  # the line of the front, as beads
        taken += [_around(start + i / steps * (end - start), 2) for i in range(steps + 1)]
    for point in points:
        label = axes.annotate(
            shortened(point.label, 22),
            (point.bytes, point.perplexity),
            textcoords="offset pixels",
            xytext=(0, 0),
            fontsize=10,
            color=INK,
            ha="center",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 7},
        )
        label.get_window_extent()  # puts the text at its point
        own = Text.get_window_extent(label)
        offsets = [
            (right * (gap + own.width / 2), up * (gap + own.height / 2))
            for gap in _GAPS
            for right, up in _SIDES
        ]
        costs = [_covered(own.translated(*offset), taken, inside) for offset in offsets]
        best = offsets[costs.index(min(costs))]  # the first of equals
        taken.append(own.translated(*best))
        label.set_position(best)


# Pixels between a point and its label, and on which side of it the label is: the best first.
_GAPS = (8, 20, 34, 50)
_SIDES = ((1, 0), (0, 1), (-1, 0), (0, -1), (0.8, 0.8), (-0.8, -0.8), (0.8, -0.8), (-0.8, 0.8))


def _around(place: ArrayLike, half: float) -> Bbox:
    x, y = np.asarray(place)
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _covered(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    """The area that a box has in common with others, and four times what is outside of the axes."""
    common = [Bbox.intersection(box, other) for other in (*taken, inside)]
    *others, within = (0.0 if each is None else each.width * each.height for each in common)
    return sum(others) + 4 * (box.width * box.height - within)
