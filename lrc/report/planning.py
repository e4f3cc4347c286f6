"""Plans that were made for a budget: the record, and a picture of what is kept by layer and component."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

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
class Planned:
    """One plan that was written. ``nats``: predicted rise of the loss, which multiplies perplexity by ``factor``."""

    path: str
    asked: str
    keep: float
    kept: int
    whole: int
    bytes: int
    kv_bytes_per_token: int
    nats: float
    factor: float
    strips: list[Strip]


@dataclass(frozen=True)
class Planning:
    """The plans of one measurement. ``loss``: nats per held-out token of the model as it is; ``measured``: in this run,
    not taken from the file ``curves``; ``seconds`` and ``peak_bytes`` as in a report.
    """

    model: str
    plans: list[Planned]
    curves: str
    measured: bool
    loss: float
    calibration: str
    held_out: str
    dtype: str
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    warnings: list[str]


def pictures(planning: Planning) -> Iterator[RenderableType]:
    """Every plan with a row a target, a bar a layer; then what they rest on."""
    for plan in planning.plans:
        yield (
            f"{plan.path}: keeps {plan.keep:.2%} of the decoder's weights, {plan.bytes:,} bytes; "
            f"predicted +{plan.nats:.4f} nats, perplexity x {plan.factor:.3f}"
        )
        table = Table("target", "rank by layer, first to last", "least", "mean", "of")
        for column in table.columns[2:]:
            column.justify = "right"
        for strip in plan.strips:
            sizes = [strip.full if size is None else size for size in strip.sizes]
            mean = sum(sizes) / len(sizes)
            table.add_row(strip.target, _bars(strip, sizes), str(min(sizes)), f"{mean:.1f}", str(strip.full))
        yield table
    how = "measured" if planning.measured else "not measured again"
    yield f"loss on {planning.held_out}: {planning.loss:.4f} nats per token; curves, {how}: {planning.curves}"
    yield "seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in planning.seconds.items())
    yield from (f"warning: {warning}" for warning in planning.warnings)


def _bars(strip: Strip, sizes: list[int]) -> Text:
    bars = Text()
    for size in sizes:
        # The last of the marks is for what is whole.
        bar, colour = (marks[int(size / strip.full * (len(marks) - 1))] for marks in (_BARS, _COLOURS))
        bars.append(bar, colour)
    return bars
