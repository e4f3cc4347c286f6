"""Plans that were made for a budget: the record, and a picture of what is kept by layer and component."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from lrc.plan.resolved import weights_of
from lrc.records.planning import Planning, cost_text
from lrc.report.tables import seconds_line, warning_lines

if TYPE_CHECKING:
    from rich.console import RenderableType
from lrc.methods.sizes import size_text

_BARS = "▁▂▃▄▅▆▇█"
_COLOURS = ("red", "dark_orange", "yellow", "green")


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
            _, least = min(zip(strip.keeps, sizes, strict=True), key=lambda each: each[0])
            numbers = [size for size in sizes if isinstance(size, int)]
            mean = f"{sum(numbers) / len(numbers):.1f}" if len(numbers) == len(sizes) else ""
            table.add_row(strip.target, _bars(strip.keeps), size_text(least), mean, size_text(strip.full))
        if plan.strips:
            yield table
        yield from (outside.text for outside in plan.tables)
    if planning.loss is not None:
        yield f"loss on {planning.held_out}: {planning.loss:.4f} nats per token"
    if planning.curves is not None:
        how = "found in this run" if planning.measured else "used again"
        yield f"curves by {planning.allocation}, {how}: {planning.curves}"
    yield seconds_line(planning.seconds)
    yield from warning_lines(planning.warnings)


def _bars(keeps: Sequence[float]) -> Text:
    bars = Text()
    for keep in keeps:
        # The last of the marks is for what is whole.
        bar, colour = (marks[int(keep * (len(marks) - 1))] for marks in (_BARS, _COLOURS))
        bars.append(bar, colour)
    return bars
