"""Plans for a budget as tables, with a bar for each layer."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING

from rich.text import Text

from lrc.methods.sizes import size_text
from lrc.plan.resolved import weights_of
from lrc.records.planning import LayerSizes, Planning, cost_text
from lrc.report.table import Cell, table
from lrc.report.tables import seconds_line

if TYPE_CHECKING:
    from rich.console import RenderableType

_BARS = "▁▂▃▄▅▆▇█"
_COLOURS = ("red", "dark_orange", "yellow", "green")


def plan_tables(planning: Planning) -> Iterator[RenderableType]:
    """Yield every plan, a row for each target, and then what the costs were measured on."""
    for plan in planning.plans:
        cost = cost_text(plan.cost, planning.unit)
        yield (
            f"{plan.path}: keeps {plan.keep:.2%} of {weights_of(plan.of)}, {plan.bytes:,} bytes"
            + (f"; predicted {cost}" if cost else "")
        )
        if plan.targets:
            yield table(map(_row, plan.targets)).on_screen()
        yield from (outside.text for outside in plan.tables)
    if planning.loss is not None:
        yield f"loss on {planning.held_out}: {planning.loss:.4f} nats per token"
    if planning.curves is not None:
        how = "found in this run" if planning.measured else "used again"
        yield f"curves by {planning.allocation}, {how}: {planning.curves}"
    yield seconds_line(planning.seconds)


def _row(target: LayerSizes) -> dict[str, Cell]:
    sizes = [target.full if size is None else size for size in target.sizes]
    _, least = min(zip(target.keeps, sizes, strict=True), key=lambda each: each[0])
    numbers = [size for size in sizes if isinstance(size, int)]
    bars = Text()
    for keep in target.keeps:
        # The last mark is for a whole target.
        bar, colour = (marks[int(keep * (len(marks) - 1))] for marks in (_BARS, _COLOURS))
        bars.append(bar, colour)
    return {
        "target": target.target,
        "rank by layer, first to last": bars,
        "least:n": size_text(least),
        "mean:n": f"{fmean(numbers):.1f}" if len(numbers) == len(sizes) else "",
        "of:n": size_text(target.full),
    }
