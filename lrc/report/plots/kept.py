"""Picture: the kept fraction of each target, a row for each target and a bar for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.patches import Patch

from lrc.report.plots.theme import INK, MUTED, PHONE, RULE, SERIES, drawing, svg

_ROW, _EDGES = 42, 46  # pixels of a row, and of what is above and below all rows


@dataclass(frozen=True)
class Row:
    """One target: fraction and method by layer (method None where it stays whole), one bar outside the layers.

    ``size``: its rank or width in words.
    """

    target: str
    kept: list[float]
    methods: list[str | None]
    size: str


def kept(name: str, rows: Sequence[Row]) -> str:
    """Return the picture of a model, on light bars of the original's height."""
    methods = list(dict.fromkeys(m for row in rows for m in row.methods if m is not None))
    colours = {method: SERIES[i % len(SERIES)] for i, method in enumerate(methods)}
    layers = max(len(row.kept) for row in rows)
    with drawing(PHONE, _EDGES + _ROW * len(rows) + (18 if len(methods) > 1 else 0)) as figure:
        panels = figure.subplots(len(rows), 1, squeeze=False, sharex=True)[:, 0]
        for row, axes in zip(rows, panels, strict=True):
            bars = len(row.kept)
            wide = layers / bars
            places = [wide * (i + 0.5) - 0.5 for i in range(bars)]
            bar = wide * 0.82 if bars > 1 else wide
            axes.bar(places, 1, bar, color=RULE, linewidth=0)
            shown = [colours[m] if m is not None else MUTED for m in row.methods]
            axes.bar(places, row.kept, bar, color=shown, linewidth=0)
            axes.set(ylim=(0, 1), yticks=[], xlim=(-0.6, layers - 0.4))
            axes.grid(visible=False)
            axes.tick_params(bottom=False, labelbottom=False)
            axes.spines[:].set_visible(False)
            axes.text(-0.02, 0.5, row.target, transform=axes.transAxes, ha="right", va="center", color=INK)
            axes.text(1.02, 0.5, row.size, transform=axes.transAxes, va="center", color=MUTED, fontsize=10)
        panels[-1].set_xticks(range(0, layers, max(1, -(-layers // 10))))
        panels[-1].tick_params(labelbottom=True)
        panels[-1].set_xlabel("layer")
        if len(methods) > 1:
            figure.legend(
                handles=[Patch(color=colours[m], label=m) for m in methods],
                loc="outside upper left",
                ncols=min(len(methods), 3),
                handlelength=1,
                handleheight=1,
            )
        targets = ", ".join(row.target for row in rows)
        return svg(figure, name, f"Weights kept in each of {layers} layers of {targets}")
