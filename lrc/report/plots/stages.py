"""Seconds and device memory by stage of a run, as bars beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from matplotlib.axes import Axes

from lrc.report.plots.theme import INK, PHONE, SERIES, drawing, svg

_ROW, _EDGES = 19, 34


def stages(name: str, seconds: Mapping[str, float], bytes_: Mapping[str, int], width: float = PHONE) -> str:
    """The picture of a run; the memory is left out where there is none to tell."""
    labels = list(seconds)
    with drawing(width, _EDGES + _ROW * len(labels)) as figure:
        panels = figure.subplots(1, 2 if bytes_ else 1, squeeze=False, sharey=True)[0]
        times = [seconds[label] for label in labels]
        _bars(panels[0], labels, times, "seconds", lambda value: f"{value:.1f}", SERIES[0])
        if bytes_:
            sizes = [bytes_.get(label, 0) / 2**30 for label in labels]
            _bars(panels[1], labels, sizes, "peak GiB", lambda value: f"{value:.2f}", SERIES[1])
        return svg(figure, name, "Seconds" + (" and peak of device memory" if bytes_ else "") + " by stage")


def _bars(
    axes: Axes, labels: list[str], values: list[float], title: str, text: Callable[[float], str], colour: str
) -> None:
    places = range(len(labels))
    axes.barh(places, values, height=0.66, color=colour, linewidth=0)
    most = max(values, default=0) or 1.0
    for place, value in zip(places, values, strict=True):
        axes.text(value + 0.02 * most, place, text(value), va="center", color=INK, fontsize=10)
    axes.set(
        yticks=places, yticklabels=labels, ylim=(len(labels) - 0.4, -0.6), xlim=(0, 1.22 * most), xticks=[]
    )
    axes.grid(visible=False)
    axes.tick_params(left=False, labelcolor=INK)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(title)
