"""An ablation as a table and as a heat map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lrc.records.ablation import Ablation
from lrc.records.number import number
from lrc.report.plots.heatmap import heatmap
from lrc.report.plots.theme import standalone
from lrc.report.table import Cell, grouped, table
from lrc.report.tables import seconds_line

if TYPE_CHECKING:
    from rich.console import RenderableType

_LARGEST = 1e3  # times the dense perplexity; a larger rise has the same colour


def picture(ablation: Ablation) -> str:
    """Return the heat map of an ablation as the text of an SVG file."""
    by_target = grouped(ablation.results, lambda result: result.target)
    increases = [[result.increase for result in results] for results in by_target.values()]
    # Logarithms of perplexity over the dense model's; NaN has the colour of the largest.
    ratios = [
        [increase + 1 if increase + 1 < _LARGEST else _LARGEST for increase in row] for row in increases
    ]
    rises = [[math.log(max(ratio, 1.0)) for ratio in row] for row in ratios]
    most = max(max(row) for row in rises) or 1
    return standalone(
        heatmap(
            "ablation",
            [[rise / most for rise in row] for row in rises],
            [[percent(increase) for increase in row] for row in increases],
            list(by_target),
            [f"{keep:g} ({1 / keep:.3g}x)" for keep in ablation.keeps],
            title=f"Rise of perplexity ({number(ablation.dense.value)} dense), one target alone",
            below="kept of the target's weights, in all layers",
            label=f"Rise of perplexity of {ablation.model} on {ablation.dense.data} with one target alone shrunk",
        )
    )


def ablation_table(ablation: Ablation) -> Iterator[RenderableType]:
    """Yield perplexity with each target alone shrunk, by kept fraction, and the rise over the dense model's."""
    dense = ablation.dense
    yield f"model: {ablation.model}"
    yield (
        f"dense perplexity: {number(dense.value, 5)} on {dense.data} ({dense.windows} x {dense.seq_len} tokens, "
        f"{dense.dtype}); below with one target alone shrunk in all layers"
    )
    rows: dict[str, dict[str, Cell]] = {}
    for result in ablation.results:
        row = rows.setdefault(result.target, {"target": result.target, "method": result.method})
        heading = f"{result.keep:g} kept, {1 / result.keep:.4g}x:n"
        row[heading] = f"{number(result.perplexity, 5)} ({percent(result.increase)})"
    yield table(rows.values()).on_screen()
    yield f"calibration: {ablation.calibration}"
    yield f"results: {ablation.file} ({ablation.measured} of {len(ablation.results)} measured in this run)"
    if ablation.seconds:
        yield seconds_line(ablation.seconds)


def percent(increase: float) -> str:
    """Return an increase in few characters: +3.2 %, +150.0 %, 41x."""
    if not increase < 10:  # or NaN
        return f"{number(increase + 1, 3)}x"
    return f"{round(100 * increase, 1) or 0.0:+.1f} %"  # no -0.0
