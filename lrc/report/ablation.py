"""What shrinking one projection or component alone costs: the record, and the table that papers print."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from lrc.report.plots.heatmap import heatmap

if TYPE_CHECKING:
    from rich.console import RenderableType
from lrc.records.ablation import Ablation


def picture(ablation: Ablation) -> str:
    """The heat map of an ablation as the text of an SVG file."""
    rows = {t: [ablation.at(t, keep).increase for keep in ablation.keeps] for t in ablation.targets}
    return heatmap(
        rows,
        ablation.keeps,
        percent,
        title=f"Rise of perplexity ({ablation.dense.value:.4g} dense), one target alone",
        label=f"Rise of perplexity of {ablation.model} on {ablation.dense.data} with one target alone shrunk",
    )


def ablation_table(ablation: Ablation) -> Iterator[RenderableType]:
    """Perplexity with each target alone shrunk, by kept fraction, and what that adds to the dense model's."""
    dense = ablation.dense
    yield f"model: {ablation.model}"
    yield (
        f"dense perplexity: {dense.value:.5g} on {dense.data} ({dense.windows} x {dense.seq_len} tokens, "
        f"{dense.dtype}); below with one target alone shrunk in all layers"
    )
    table = Table("target", "method", *(f"{keep:g} kept, {1 / keep:.4g}x" for keep in ablation.keeps))
    for column in table.columns[2:]:
        column.justify = "right"
    for target, method in ablation.targets.items():
        results = [ablation.at(target, keep) for keep in ablation.keeps]
        table.add_row(target, method, *(f"{r.perplexity:.5g} ({percent(r.increase)})" for r in results))
    yield table
    yield f"calibration: {ablation.calibration}"
    yield f"results: {ablation.file} ({ablation.measured} of {len(ablation.results)} measured in this run)"
    if ablation.seconds:  # of what was measured
        yield "seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in ablation.seconds.items())
    yield from (f"warning: {warning}" for warning in ablation.warnings)


def percent(increase: float) -> str:
    """An increase in few characters: +3.2 %, +150.0 %, 41x."""
    if not increase < 10:  # so that NaN and infinity are told, too
        return f"{increase + 1:.3g}x"
    return f"{round(100 * increase, 1) or 0.0:+.1f} %"  # no -0.0
