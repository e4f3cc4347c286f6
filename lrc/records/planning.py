"""The result of ``lrc plan``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lrc.methods.sizes import SizeValue, size_text
from lrc.records.number import number


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one target by layer; None where the plan keeps the target whole.

    ``keeps``: the share of its weights that each layer keeps.
    """

    target: str
    full: SizeValue
    sizes: list[SizeValue | None]
    keeps: list[float]


@dataclass(frozen=True)
class TableSize:
    """Size of the embedding or the head, which keeps ``kept`` of ``whole`` weights."""

    target: str
    size: SizeValue
    kept: int
    whole: int

    @property
    def text(self) -> str:
        """The size in words."""
        if self.kept == self.whole:
            return f"{self.target} stays whole"
        return f"{self.target}: size {size_text(self.size)}, {self.kept / self.whole:.1%} of its weights"


@dataclass(frozen=True)
class Planned:
    """One plan that was written. It keeps ``kept`` of ``whole`` weights of ``of``: the decoder, and tables it sized.

    ``cost``: predicted, in the unit of the planning. ``factor``: on perplexity, if that unit is nats. ``targets`` has
    the sizes in the layers, ``tables`` those outside.
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
    targets: list[LayerSizes]
    tables: list[TableSize]


@dataclass(frozen=True)
class Planning:
    """The plans of one allocation, whose costs are in ``unit``.

    ``curves``: the file of the costs, if any were needed. ``measured``: whether this run measured them. ``loss``: the
    dense model's nats per held-out token, if costs were measured on that text.
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
    """Return the factor on perplexity of a cost in nats; None for other units."""
    return math.exp(min(cost, 700.0)) if unit in ("nats", "predicted nats") else None


def cost_text(cost: float, unit: str) -> str:
    """Return a cost in words; empty for a unit that says nothing about the model."""
    if (times := factor(cost, unit)) is not None:
        return f"{cost:+.4f} nats per token, perplexity times {number(times)}"
    return "" if unit == "squared shortfall" else f"a cost of {number(cost)} in {unit}"
