"""What shrinking one projection or component alone costs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from lrc.evaluation.perplexity import Perplexity


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


def ablated(target: str, method: str, keep: float, kept: float, nats: float, dense: float) -> Ablated:
    """The figures that follow from the loss per token with one target shrunk, and that of the ``dense`` model."""
    return Ablated(target, method, keep, kept, nats, _exp(nats), _exp(nats - dense) - 1)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf if nats == nats else math.nan
