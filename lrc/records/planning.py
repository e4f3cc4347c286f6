"""Plans that were made for a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lrc.methods.sizes import SizeValue, size_text


@dataclass(frozen=True)
class Strip:
    """Sizes of one target by layer; None where the plan leaves a layer's to itself, which keeps it whole.

    ``keeps``: the share of its weights that each keeps.
    """

    target: str
    full: SizeValue
    sizes: list[SizeValue | None]
    keeps: list[float]


@dataclass(frozen=True)
class TableSize:
    """Size of the embedding or the head, ``kept`` of whose ``whole`` weights stay."""

    target: str
    size: SizeValue
    kept: int
    whole: int

    @property
    def text(self) -> str:
        """The same in words."""
        if self.kept == self.whole:
            return f"{self.target} stays whole"
        return f"{self.target}: size {size_text(self.size)}, {self.kept / self.whole:.1%} of its weights"


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
