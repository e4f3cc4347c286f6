"""Uniform: every target keeps the same fraction of its weights, as nearly as sizes allow within the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lrc.allocation.contract import Advance, Costs, Setting, blank_curves
from lrc.allocation.spend import Curve
from lrc.families import Architecture
from lrc.plan.resolved import ResolvedPlan


def blank(architecture: Architecture, plans: Sequence[ResolvedPlan]) -> list[Curve]:
    """Every target that the plans shrink, at its every size."""
    return blank_curves(architecture, plans, every_size=True)


def costs(setting: Setting, advance: Advance) -> Costs:
    """w·(1 − f)² for a kept fraction f of w weights: a weight then saves 2(1 − f), the same where f is the same."""
    found = []
    for curve in blank(setting.reader.architecture, setting.plans):
        lost = [1 - kept / curve.whole for kept in curve.weights]
        found.append(replace(curve, costs=tuple(curve.whole * share**2 for share in lost)))
    return Costs(found, "squared shortfall")
