"""Check what an inspection is asked for against the model, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lrc.errors import UserError, nearest
from lrc.families import Architecture, Target
from lrc.inspection.candidates import TABLE_COLLECTORS, Candidate, candidates
from lrc.methods import Method, methods
from lrc.moments import collectors
from lrc.moments.gradient import GRADIENTS
from lrc.plan.resolved import LayerPlan
from lrc.plan.schema import Calibration, Plan, matched_layers


@dataclass(frozen=True)
class Asked:
    """Hold the layers, the targets ``inside`` and ``outside`` of them, and by target the candidates to estimate."""

    methods: Mapping[str, Method]
    keeps: Sequence[float]
    layers: list[int]
    inside: list[Target]
    outside: list[Target]
    candidates: Mapping[str, list[Candidate]]

    @property
    def plans(self) -> tuple[LayerPlan, ...]:
        """All candidates of the targets, for each layer."""
        chosen = tuple(one.assignment for target in self.inside for one in self.candidates[target.name])
        return tuple(LayerPlan(index, chosen) for index in self.layers)


def find_asked(
    architecture: Architecture,
    known: Mapping[str, Method],
    keeps: Sequence[float],
    layers: str | None,
    names: Sequence[str] | None,
    *,
    tables: bool,
    gradients: bool,
) -> Asked:
    """Find the layers, targets and candidates of an inspection. Raises UserError for an unknown layer or target."""
    chosen = set(range(architecture.layers))
    if layers is not None:
        try:
            chosen = matched_layers(layers, architecture.layers)
        except ValueError as error:
            raise UserError(f"--layers {layers}: {error}") from None
    there = architecture.targets | architecture.outer
    for name in names or ():
        if name == "lm_head" and architecture.tied:
            raise UserError(
                "--targets lm_head: the head of this model is its embedding; name embed, which is both"
            )
        if name not in there:
            model = architecture.family.model_type
            raise UserError(f"--targets {name}: {model} has no target {name!r}; {nearest(name, there)}")
    inside = [t for name, t in architecture.targets.items() if names is None or name in names]
    outside = [t for name, t in architecture.outer.items() if (tables if names is None else name in names)]
    collected = collectors() if gradients else collectors() - {GRADIENTS}
    found = candidates(architecture, inside, known, keeps, collected)
    found |= candidates(architecture, outside, known, keeps, TABLE_COLLECTORS)
    return Asked(known, keeps, sorted(chosen) if inside else [], inside, outside, found)


def known_methods(names: Sequence[str] | None) -> dict[str, Method]:
    """Return methods by name, or all without ``names``. Raises UserError for an unknown method."""
    known = methods()
    for name in names or ():
        if name not in known:
            raise UserError(f"--methods {name}: there is no such method; {nearest(name, known)}")
    return {name: method for name, method in known.items() if names is None or name in names}


def base_plan(architecture: Architecture, samples: int, seq_len: int | None, *, gradients: bool) -> Plan:
    """Return a plan whose solvers read moments at all sites, and ``gradients`` of all projections if asked for."""
    if seq_len is not None and not 2 <= seq_len <= architecture.positions:
        raise UserError(
            f"--seq-len {seq_len}: the model reads 2 to {architecture.positions} tokens at once; the nearest is "
            f"{min(max(seq_len, 2), architecture.positions)}"
        )
    calibration = Calibration(samples=samples, gradient_samples=samples, seq_len=seq_len)
    return Plan(method="two_sided_svd" if gradients else "whitened_svd", calibration=calibration)
