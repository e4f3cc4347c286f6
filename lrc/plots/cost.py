"""What quality costs: perplexity against bytes, an output a point, with the front that none of them is below."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from lrc.plots.theme import INK, MARKERS, MUTED, PAPER, PHONE, SERIES, compact, drawing, log_scale, svg

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


def cost(name: str, text: str, points: Sequence[Point], width: float = PHONE) -> str:
    """The picture of one text. Points whose perplexity is not finite are left out, as an axis has no place for them."""
    shown = [point for point in points if math.isfinite(point.perplexity) and point.perplexity > 0]
    kinds = list(dict.fromkeys(point.kind for point in shown if point.kind is not None))
    with drawing(width, 0.78 * width) as figure:
        axes = figure.subplots()
        axes.set_title(f"perplexity on {text}", color=INK)
        edge = front(shown)
        axes.plot([p.bytes for p in edge], [p.perplexity for p in edge], color=MUTED, linewidth=1, zorder=1.5)
        for i, kind in enumerate(kinds):
            of_kind = [point for point in shown if point.kind == kind]
            _marks(axes, of_kind, SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)], kind)
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
        _label(figure, axes, shown)
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
    ticks = [tick * size for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(0, most / size)]
    axes.set_xticks([tick for tick in ticks if tick <= 1.08 * most])
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


def _label(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Write each label at its point, or further off with a line to it, where it covers least of marks and labels."""
    figure.draw_without_rendering()  # what is laid out now stays where it is
    figure.set_layout_engine("none")
    inside = axes.get_window_extent()
    marks = [axes.transData.transform((point.bytes, point.perplexity)) for point in points]
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in marks]
    for point, (x, y) in zip(points, marks, strict=True):
        label = axes.annotate(
            point.label,
            (point.bytes, point.perplexity),
            textcoords="offset pixels",
            xytext=(0, 0),
            fontsize=10,
            color=INK,
            annotation_clip=False,
        )
        size = label.get_window_extent()

        def box(
            place: _Place, x: float = x, y: float = y, w: float = size.width, h: float = size.height
        ) -> Bbox:
            left, low = x + place.x - w * _SHARE[place.ha], y + place.y - h * _SHARE[place.va]
            return Bbox.from_bounds(left, low, w, h)

        def covers(place: _Place, box: Callable[[_Place], Bbox] = box) -> float:
            here = box(place)
            outside = here.width * here.height - _common(here, inside)
            return sum(_common(here, other) for other in taken) + 4 * outside

        best = min(_PLACES, key=covers)  # the first of equals
        taken.append(box(best))
        label.set(position=(best.x, best.y), ha=best.ha, va=best.va)
        if best.far:
            end = box(best)
            to_x, to_y = min(max(x, end.x0), end.x1), min(max(y, end.y0), end.y1)
            back = axes.transData.inverted()
            (x0, y0), (x1, y1) = back.transform((x, y)), back.transform((to_x, to_y))
            axes.plot([x0, x1], [y0, y1], color=MUTED, linewidth=0.6, zorder=2, clip_on=False)


class _Place(NamedTuple):
    """Pixels from a point to its label, the label's side that is there, and whether a line leads to it."""

    x: float
    y: float
    ha: Literal["left", "center", "right"]
    va: Literal["bottom", "center", "top"]
    far: bool


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


def _common(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else both.width * both.height
