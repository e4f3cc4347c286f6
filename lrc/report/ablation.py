"""What shrinking one projection or component alone costs: the record, and the table that papers print."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lrc.evaluation.perplexity import Perplexity
from lrc.plots.heatmap import heatmap

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Ablated:
    """One target shrunk in all layers at once by ``method``, all else whole: to ``kept`` of its weights, asked for
    ``keep``. ``nats``: the loss per token then, ``perplexity`` its exponential and ``increase`` that over the dense
    model's, less one.
    """

    target: str
    method: str
    keep: float
    kept: float
    nats: float
    perplexity: float
    increase: float


@dataclass(frozen=True)
class Ablation:
    """The cost of each target alone at each kept fraction, on the text that ``dense`` was measured on.

    ``file``: where what was measured is kept, to be used again; ``measured``: how many of ``results`` this run found.
    ``picture``: the heat map.
    """

    model: str
    dense: Perplexity
    results: list[Ablated]
    keeps: list[float]
    calibration: str
    file: str
    picture: str
    measured: int
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    warnings: list[str]

    @property
    def targets(self) -> dict[str, str]:
        """The method of every target, in order."""
        return {result.target: result.method for result in self.results}

    def at(self, target: str, keep: float) -> Ablated:
        """The result of one target at one fraction."""
        return next(r for r in self.results if (r.target, r.keep) == (target, keep))

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


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


def ablated(target: str, method: str, keep: float, kept: float, nats: float, dense: float) -> Ablated:
    """The figures that follow from the loss per token with one target shrunk, and that of the ``dense`` model."""
    return Ablated(target, method, keep, kept, nats, _exp(nats), _exp(nats - dense) - 1)


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


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf if nats == nats else math.nan
