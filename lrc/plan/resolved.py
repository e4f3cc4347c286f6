"""A plan worked out for one model: what is done to which target of which layer, at which size."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lrc.plan.schema import Plan

_DECODER, _TABLES = "decoder", {"embed": "embedding", "lm_head": "head"}  # as people call them


@dataclass(frozen=True)
class Assignment:
    """One target to shrink, of a layer or outside, with all options of its solver; ``kept``, ``whole`` in weights.

    ``size`` is a ``lrc.methods.sizes.SizeValue`` of the method's own type.
    """

    target: str
    method: str
    size: Any
    options: dict[str, Any]
    kept: int
    whole: int


@dataclass(frozen=True)
class LayerPlan:
    """What is done to one decoder layer; what has no assignment stays as it is."""

    index: int
    assignments: tuple[Assignment, ...]

    @property
    def targets(self) -> set[str]:
        """What is shrunk."""
        return {assignment.target for assignment in self.assignments}


@dataclass(frozen=True)
class Share:
    """``kept`` weights, which are ``keep`` of the ``whole`` of ``of``: the decoder, alone or with tables outside it."""

    of: str
    keep: float
    kept: int
    whole: int

    @property
    def weights(self) -> str:
        """What it is a share of, in words."""
        return weights_of(self.of)


def weights_of(part: str) -> str:
    """The weights of what ``Share.of`` names, in words."""
    return "the decoder's weights" if part == _DECODER else f"the weights of {part}"


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan and what it comes to; ``whole`` counts weights of the decoder's projections, biases aside.

    ``seq_len``: tokens of a calibration block, whose first one counts as ``first_token`` tokens in moments.
    ``outer``: what is done to the embedding and the head, which ``kept`` and ``whole`` leave out. ``tables``: weights
    of those that the plan names. ``shared``: of these, the ones whose sizes an allocation finds, within a budget that
    they then share with the decoder.
    """

    plan: Plan
    layers: tuple[LayerPlan, ...]
    seq_len: int
    first_token: int
    whole: int
    warnings: tuple[str, ...]
    outer: tuple[Assignment, ...] = ()
    tables: Mapping[str, int] = field(default_factory=dict)
    shared: tuple[str, ...] = ()

    @property
    def kept(self) -> int:
        """Weights of the decoder's projections after compression."""
        return self.whole - sum(a.whole - a.kept for layer in self.layers for a in layer.assignments)

    @property
    def keep(self) -> float:
        """Kept weights over all weights of the decoder's projections."""
        return self.kept / self.whole

    @property
    def budget(self) -> Share:
        """What a budget is of: the decoder, and the tables whose sizes an allocation finds."""
        return self._share(self.shared)

    @property
    def with_tables(self) -> Share | None:
        """The decoder and all tables that the plan names; None where it names none."""
        return self._share(self.tables) if self.tables else None

    def unsized(self, layer: int | None) -> tuple[Assignment, ...]:
        """What an allocation finds sizes for: of one layer, or None for outside the layers."""
        if layer is None:
            return tuple(a for a in self.outer if a.target in self.shared)
        return self.layers[layer].assignments

    def _share(self, tables: Collection[str]) -> Share:
        names = [_DECODER, *(_TABLES[name] for name in tables)]
        whole = self.whole + sum(self.tables[name] for name in tables)
        lost = self.whole - self.kept + sum(a.whole - a.kept for a in self.outer if a.target in tables)
        of = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
        return Share(of, (whole - lost) / whole, whole - lost, whole)

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values, equal for equal work: to store, hash and compare."""
        return {
            "plan": self.plan.model_dump(mode="json", exclude_none=True),
            "seq_len": self.seq_len,
            "first_token": self.first_token,
            "layers": [asdict(layer) for layer in self.layers],
            "outer": [asdict(assignment) for assignment in self.outer],
            "kept": self.kept,
            "whole": self.whole,
        }
