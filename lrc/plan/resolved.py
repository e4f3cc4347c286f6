"""A plan worked out for one model: what is done to which target of which layer, at which size."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lrc.plan.schema import Plan


@dataclass(frozen=True)
class Assignment:
    """One target to shrink, of a layer or outside, with all options of its solver; ``kept``, ``whole`` in weights."""

    target: str
    method: str
    size: int
    options: dict[str, Any]
    kept: int
    whole: int


@dataclass(frozen=True)
class LayerPlan:
    """What is done to one decoder layer; what has no assignment stays as it is."""

    index: int
    assignments: tuple[Assignment, ...]


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan and what it comes to; ``whole`` counts weights of the decoder's projections, biases aside.

    ``outer``: what is done to the embedding and the head, which ``kept`` and ``whole`` leave out.
    """

    plan: Plan
    layers: tuple[LayerPlan, ...]
    seq_len: int
    whole: int
    warnings: tuple[str, ...]
    outer: tuple[Assignment, ...] = ()

    @property
    def kept(self) -> int:
        """Weights of the decoder's projections after compression."""
        return self.whole - sum(a.whole - a.kept for layer in self.layers for a in layer.assignments)

    @property
    def keep(self) -> float:
        """Kept weights over all weights of the decoder's projections."""
        return self.kept / self.whole

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values, equal for equal work: to store, hash and compare."""
        return {
            "plan": self.plan.model_dump(mode="json", exclude_none=True),
            "seq_len": self.seq_len,
            "layers": [asdict(layer) for layer in self.layers],
            "outer": [asdict(assignment) for assignment in self.outer],
            "kept": self.kept,
            "whole": self.whole,
        }
