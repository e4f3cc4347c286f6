"""Picture: perplexity against bytes, with the front of outputs that no other beats in both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from lrc.report.plots.theme import INK, MUTED, PAPER, PHONE, SERIES, drawing, shortened, svg

_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_MARKERS = "os^DvP"  # for print in grey; with the six colours the first 36 series differ


@dataclass(frozen=True)
class Point:
    """A model; ``kind`` is its method, or None for the dense model."""

    label: str
    bytes: int
    perplexity: float
    kind: str | None


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other matches or beats in bytes and perplexity, by bytes; of equal ones the first."""
    best, found = math.inf, []
    for point in sorted(points, key=lambda point: (point.bytes, point.perplexity)):
        if point.perplexity < best:
            best = point.perplexity
            found.append(point)
    return found


def cost(name: str, text: str, points: Sequence[Point], kinds: Sequence[str]) -> str:
    """Return the picture of one text, without points that are not finite; ``kinds`` are in the order of colours."""
    shown = [point for point in points if math.isfinite(point.perplexity) and point.perplexity > 0]
    with drawing(PHONE, 0.78 * PHONE) as figure:
        axes = figure.subplots()
        axes.set_title(f"perplexity on {shortened(text, 28)}")
        edge = front(shown)
        axes.plot([p.bytes for p in edge], [p.perplexity for p in edge], color=MUTED, linewidth=1, zorder=1.5)
        series: dict[str | None, tuple[str, str]] = {
            kind: (SERIES[i % 6], _MARKERS[(i + i // 6) % 6]) for i, kind in enumerate(kinds)
        }
        for kind, (colour, marker) in {**series, None: (INK, "*")}.items():
            if of_kind := [point for point in shown if point.kind == kind]:
                axes.plot(
                    [point.bytes for point in of_kind],
                    [point.perplexity for point in of_kind],
                    marker,
                    markersize=7 if kind else 11,
                    markeredgecolor=PAPER,
                    markeredgewidth=1,
                    color=colour,
                    label=kind or "dense",
                    clip_on=False,
                    zorder=3,
                )
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
        label = f"Perplexity on {text} against the bytes of the weights, {len(shown)} models"
        return svg(figure, name, label)


def _scales(axes: Axes, points: Sequence[Point]) -> None:
    """Scale bytes from zero in a fitting unit; perplexity is logarithmic if it spans a factor of three."""
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
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _label(figure: Figure, axes: Axes, points: Sequence[Point], edge: Sequence[Point]) -> None:
    """Write each label near its point where it overlaps marks, labels and the front least."""
    figure.draw_without_rendering()  # fixes the layout
    figure.set_layout_engine("none")
    inside = axes.get_window_extent()
    at = axes.transData.transform
    places = [at((point.bytes, point.perplexity)) for point in points]
    taken = [Bbox([place, place]).padded(6) for place in places]
    for start, end in pairwise(at([(point.bytes, point.perplexity) for point in edge]) if edge else []):
        steps = 1 + round(math.dist(start, end) / 4)  # boxes along the line of the front
        line = [start + i / steps * (end - start) for i in range(steps + 1)]
        taken += [Bbox([place, place]).padded(2) for place in line]
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
        label.get_window_extent()  # moves the text to its point
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


# Pixels between a point and its label, and sides of the point, the best first.
_GAPS = (8, 20, 34, 50)
_SIDES = ((1, 0), (0, 1), (-1, 0), (0, -1), (0.8, 0.8), (-0.8, -0.8), (0.8, -0.8), (-0.8, 0.8))


def _covered(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    """Return the area that a box shares with others, plus four times its area outside the axes."""
    common = [Bbox.intersection(box, other) for other in (*taken, inside)]
    *others, within = (0.0 if each is None else each.width * each.height for each in common)
    return sum(others) + 4 * (box.width * box.height - within)
