"""Plans that were made for a budget: the record, and a picture of what is kept by layer and component."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from lrc.plan.resolved import weights_of

if TYPE_CHECKING:
    from rich.console import RenderableType

_BARS = "▁▂▃▄▅▆▇█"
_COLOURS = ("red", "dark_orange", "yellow", "green")


@dataclass(frozen=True)
class Strip:
    """Sizes of one target by layer; None where the plan leaves a layer's to itself, which keeps it whole."""

    target: str
    full: int
    sizes: list[int | None]


@dataclass(frozen=True)
class TableSize:
    """Size of the embedding or the head, ``kept`` of whose ``whole`` weights stay."""

    target: str
    size: int
    kept: int
    whole: int

    @property
    def text(self) -> str:
        """The same in words."""
        if self.kept == self.whole:
            return f"{self.target} stays whole"
        return f"{self.target}: size {self.size}, {self.kept / self.whole:.1%} of its weights"


@dataclass(frozen=True)
class Planned:
    """One plan that was written. It keeps ``kept`` weights, ``keep`` of the ``whole`` of what ``of`` names: the decoder
    and the tables whose sizes were found. ``cost``: what its sizes are predicted to cost, in the unit of the planning;
    where that is nats, it multiplies perplexity by ``factor``. ``tables``: what is outside the layers.
    """

    path: str
    asked: str
    of: str
    keep: float
    kept: int
    whole: int
    bytes: int
    kv_bytes_per_token: int
    cost: float
    factor: float | None
    strips: list[Strip]
    tables: list[TableSize]


@dataclass(frozen=True)
class Planning:
    """The plans of one allocation, whose costs are in ``unit``.

    ``curves``: the file of what sizes cost, None where nothing had to be found; ``measured``: in this run, not taken
    from that file. ``loss``: nats per held-out token of the model as it is, where sizes were measured on that text.
    ``seconds`` and ``peak_bytes`` as in a report.
    """

    model: str
    allocation: str
    unit: str
    plans: list[Planned]
    curves: str | None
    measured: bool
    loss: float | None
    calibration: str
    held_out: str | None
    dtype: str
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    warnings: list[str]


def factor(cost: float, unit: str) -> float | None:
    """What a cost multiplies perplexity by; None where its unit is not of the loss."""
    return math.exp(min(cost, 700.0)) if unit in ("nats", "predicted nats") else None


def cost_text(cost: float, unit: str) -> str:
    """A cost in words; empty where it says nothing about the model."""
    if (times := factor(cost, unit)) is not None:
        return f"{cost:+.4f} nats per token, perplexity times {times:.4g}"
    return "" if unit == "squared shortfall" else f"a cost of {cost:.4g} in {unit}"


def pictures(planning: Planning) -> Iterator[RenderableType]:
    """Every plan with a row a target, a bar a layer; then what they rest on."""
    for plan in planning.plans:
        cost = cost_text(plan.cost, planning.unit)
        yield (
            f"{plan.path}: keeps {plan.keep:.2%} of {weights_of(plan.of)}, {plan.bytes:,} bytes"
            + (f"; predicted {cost}" if cost else "")
        )
        table = Table("target", "rank by layer, first to last", "least", "mean", "of")
        for column in table.columns[2:]:
            column.justify = "right"
        for strip in plan.strips:
            sizes = [strip.full if size is None else size for size in strip.sizes]
            mean = sum(sizes) / len(sizes)
            table.add_row(strip.target, _bars(strip, sizes), str(min(sizes)), f"{mean:.1f}", str(strip.full))
        if plan.strips:
            yield table
        yield from (outside.text for outside in plan.tables)
    if planning.loss is not None:
        yield f"loss on {planning.held_out}: {planning.loss:.4f} nats per token"
    if planning.curves is not None:
        how = "found in this run" if planning.measured else "used again"
        yield f"curves by {planning.allocation}, {how}: {planning.curves}"
    yield "seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in planning.seconds.items())
    yield from (f"warning: {warning}" for warning in planning.warnings)


def _bars(strip: Strip, sizes: list[int]) -> Text:
    bars = Text()
    for size in sizes:
        # The last of the marks is for what is whole.
        bar, colour = (marks[int(size / strip.full * (len(marks) - 1))] for marks in (_BARS, _COLOURS))
        bars.append(bar, colour)
    return bars
