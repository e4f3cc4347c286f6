"""Uniform: every target keeps the same fraction of its weights, as nearly as sizes allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lrc.allocation.contract import Advance, Costs, Setting, blank_curves
from lrc.allocation.spend import Curve
from lrc.families import Architecture
from lrc.plan.resolved import ResolvedPlan


def blank(architecture: Architecture, plans: Sequence[ResolvedPlan]) -> list[Curve]:
    """Return a curve over all sizes for each target that the plans shrink."""
    return blank_curves(architecture, plans, every_size=True)


def costs(setting: Setting, advance: Advance) -> Costs:
    """Return w·(1 − f)² for a kept fraction f of w weights, so that equal f means equal saving per weight, 2(1 − f)."""
    found = []
    for curve in blank(setting.reader.architecture, setting.plans):
        lost = [1 - kept / curve.whole for kept in curve.weights]
        found.append(replace(curve, costs=tuple(curve.whole * share**2 for share in lost)))
    return Costs(found, "squared shortfall")
