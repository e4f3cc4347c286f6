"""Predicted against measured error, a point a target of a layer, beside the line on which they agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lrc.report.plots.theme import MUTED, PAPER, PHONE, drawing, log_scale, mark, svg


def errors(
    name: str, unit: str, points: Mapping[str, Sequence[tuple[float, float]]], width: float = PHONE
) -> str:
    """The picture of (predicted, measured) by target, all in ``unit``; those that a logarithm has no place for, which
    ``drawable`` tells, are left out.
    """
    shown = {target: [pair for pair in pairs if drawable(pair)] for target, pairs in points.items()}
    values = [value for pairs in shown.values() for pair in pairs for value in pair] or [0.1, 1.0]
    low, high = min(values) / 1.3, max(values) * 1.3
    with drawing(width, 0.86 * width) as figure:
        axes = figure.subplots()
        axes.set_title(f"measured error, {unit}")
        axes.axline((low, low), (high, high), color=MUTED, linewidth=1, zorder=1.5)
        for i, (target, pairs) in enumerate(shown.items()):
            colour, marker = mark(i)
            axes.plot(
                [predicted for predicted, _ in pairs],
                [measured for _, measured in pairs],
                linestyle="none",
                marker=marker,
                markersize=6.5,
                markeredgecolor=PAPER,
                markeredgewidth=0.8,
                color=colour,
                label=target,
                zorder=3,
            )
        log_scale(axes, "x")
        log_scale(axes, "y")
        axes.set(xlim=(low, high), ylim=(low, high))
        axes.set_aspect("equal")
        axes.set_xlabel("predicted", loc="right")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), handletextpad=0.2)
        return svg(figure, name, f"Measured against predicted error in {unit}, by target and layer")


def drawable(pair: tuple[float, float]) -> bool:
    """Whether both numbers of a pair stand on a logarithmic axis."""
    return all(math.isfinite(value) and value > 0 for value in pair)
