"""Heat map of an ablation: what each target alone costs at each kept fraction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from lrc.report.plots.theme import HEAT, PHONE, compact, drawing, standalone, svg

_ROW, _AROUND = 26, 92  # pixels of a row, and of title, ticks and axis label together
_LARGEST = 1e3  # times the dense perplexity: what is above is as bad


def heatmap(
    increases: Mapping[str, Sequence[float]],
    keeps: Sequence[float],
    tell: Callable[[float], str],
    *,
    title: str,
    label: str,
) -> str:
    """The text of an SVG file: a row a target, a column a kept fraction, in each the increase of perplexity.

    ``increases``: by target, of perplexity over the dense model's, less one, which ``tell`` puts into words. Colours
    are by the rise of the loss, its logarithm; a perplexity that fell has that of none. ``label`` is for those who do
    not see it.
    """
    rises = [[_rise(increase) for increase in row] for row in increases.values()]
    most = max(max(row) for row in rises)
    with drawing(PHONE, _ROW * len(rises) + _AROUND) as figure:
        axes = figure.subplots()
        # A mesh is drawn as paths, whose colours are the page's; an image would be light on dark paper.
        axes.pcolormesh(rises, cmap=HEAT, vmin=0, vmax=most or 1)
        axes.invert_yaxis()
        for row, found in enumerate(increases.values()):
            for column, increase in enumerate(found):
                axes.text(column + 0.5, row + 0.5, tell(increase), ha="center", va="center", fontsize=10)
        axes.set_xticks(_middles(keeps), [f"{keep:g} ({compact(1 / keep)}x)" for keep in keeps])
        axes.set_yticks(_middles(increases), [*increases])
        axes.set_xlabel("kept of the target's weights, in all layers")
        axes.set_title(title)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return standalone(svg(figure, "ablation", label))


def _middles(items: Sequence[object] | Mapping[str, object]) -> list[float]:
    return [place + 0.5 for place in range(len(items))]


def _rise(increase: float) -> float:
    """The logarithm of perplexity over the dense model's, between nothing and what is as bad as it gets."""
    if not increase + 1 < _LARGEST:  # so that NaN is, too
        return math.log(_LARGEST)
    return math.log(max(increase + 1, 1.0))
