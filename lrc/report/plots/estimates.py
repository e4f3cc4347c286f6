"""What methods predict that they lose of each target, by the fraction that they keep of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.lines import Line2D

from lrc.report.plots.theme import MARKERS, PHONE, SERIES, drawing, plain_ticks, svg

_ACROSS, _PANEL, _EDGES = (
    2,
    130,
    60,
)  # panels beside each other; pixels of a row of them, and of what is around all
_LEGEND = 18  # of a row of the legend

Points = Sequence[tuple[float, float]]  # kept fraction, error


def estimates(
    name: str, panels: Sequence[tuple[str, Mapping[str, Points]]], what: str, width: float = PHONE
) -> str:
    """A panel a target, a line a method; ``what`` the errors are stands beside all of them."""
    methods = list(dict.fromkeys(method for _, lines in panels for method in lines))
    looks = {m: (SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]) for i, m in enumerate(methods)}
    rows, beside = -(-len(panels) // _ACROSS), 2 if width <= PHONE else 3
    with drawing(width, _EDGES + _PANEL * rows + _LEGEND * -(-len(methods) // beside)) as figure:
        grid = figure.subplots(rows, _ACROSS, squeeze=False, sharex=True)
        for axes, (target, lines) in zip(grid.flat, panels, strict=False):
            for method, points in lines.items():
                colour, marker = looks[method]
                line = axes.plot(*zip(*sorted(points), strict=True), color=colour, marker=marker)
                line[0].set(clip_on=False, zorder=3)  # a mark on an edge is whole
            axes.set_title(target)
            axes.set(xlim=(0, 1), xticks=(0, 0.5, 1))
            axes.set_ylim(bottom=0)
            axes.locator_params(axis="y", nbins=3)
            plain_ticks(axes.yaxis)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel("kept of the target's weights", fontsize=11)
        figure.supylabel(what, fontsize=11)
        handles = [Line2D([], [], color=c, marker=k, label=m) for m, (c, k) in looks.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=beside)
        return svg(figure, name, f"{what} by kept fraction of {', '.join(target for target, _ in panels)}")
