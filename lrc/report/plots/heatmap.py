"""Picture: a table of numbers, with stronger colours for larger numbers."""

from __future__ import annotations

from collections.abc import Sequence

from lrc.report.plots.theme import HEAT, PHONE, drawing, svg

_ROW, _AROUND = 26, 92  # pixels of a row, and of title, ticks and axis label together


def heatmap(
    name: str,
    shades: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    below: str,
    label: str,
) -> str:
    """Return a picture of ``texts`` on ``shades`` between 0 and 1, by row and column.

    ``below`` is the label of the columns; ``label`` describes the picture for screen readers.
    """
    with drawing(PHONE, _ROW * len(rows) + _AROUND) as figure:
        axes = figure.subplots()
        # A mesh is drawn as paths, which take the page's colours; an image would stay light on dark paper.
        axes.pcolormesh(shades, cmap=HEAT, vmin=0, vmax=1)
        axes.invert_yaxis()
        for y, row in enumerate(texts):
            for x, text in enumerate(row):
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=10)
        axes.set_xticks([x + 0.5 for x in range(len(columns))], columns)
        axes.set_yticks([y + 0.5 for y in range(len(rows))], rows)
        axes.set_xlabel(below)
        axes.set_title(title)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return svg(figure, name, label)
