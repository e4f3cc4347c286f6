"""A plan resolved for one model: method, size and options of every target to compress."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lrc.plan.schema import Plan

_DECODER, _TABLES = "decoder", {"embed": "embedding", "lm_head": "head"}  # names in messages


@dataclass(frozen=True)
class Assignment:
    """One target to compress, with its method, size and all options of its solver.

    ``size`` is a ``lrc.methods.sizes.SizeValue``. ``kept`` and ``whole`` count weights after and before.
    """

    target: str
    method: str
    size: Any
    options: dict[str, Any]
    kept: int
    whole: int


@dataclass(frozen=True)
class LayerPlan:
    """Assignments of one decoder layer; other targets stay unchanged."""

    index: int
    assignments: tuple[Assignment, ...]

    @property
    def targets(self) -> set[str]:
        """Names of the targets to compress."""
        return {assignment.target for assignment in self.assignments}


@dataclass(frozen=True)
class Share:
    """Weights kept of the part ``of``: the decoder, alone or with tables; ``keep`` is ``kept / whole``."""

    of: str
    keep: float
    kept: int
    whole: int

    @property
    def weights(self) -> str:
        """Words for the weights that the share is of."""
        return weights_of(self.of)


def weights_of(part: str) -> str:
    """Return words for the weights of a part, as ``Share.of`` names it."""
    return "the decoder's weights" if part == _DECODER else f"the weights of {part}"


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan with the assignments of every layer; ``whole`` counts the decoder's projection weights, without biases.

    ``seq_len``: tokens of a calibration block. ``first_token``: weight of a block's first token in moments.
    ``outer``: assignments of the embedding and the head, which ``kept`` and ``whole`` do not count.
    ``tables``: weights of the embedding or head, if the plan names them. ``shared``: the tables that share the
    decoder's budget, as an allocation finds their sizes.
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
        """Kept fraction of the weights of the decoder's projections."""
        return self.kept / self.whole

    @property
    def budget(self) -> Share:
        """Share of the decoder and of the tables that share its budget."""
        return self._share(self.shared)

    @property
    def with_tables(self) -> Share | None:
        """Share of the decoder and of all tables that the plan names; None without tables."""
        return self._share(self.tables) if self.tables else None

    def unsized(self, layer: int | None) -> tuple[Assignment, ...]:
        """Return the assignments of a layer (None: outside the layers) whose sizes an allocation finds."""
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
        """Return JSON values to store, hash and compare; equal plans give equal values."""
        return {
            "plan": self.plan.model_dump(mode="json", exclude_none=True),
            "seq_len": self.seq_len,
            "first_token": self.first_token,
            "layers": [asdict(layer) for layer in self.layers],
            "outer": [asdict(assignment) for assignment in self.outer],
            "kept": self.kept,
            "whole": self.whole,
        }
