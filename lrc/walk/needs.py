"""Find the statistics, sites and gradients that the solvers of a layer need."""

from __future__ import annotations

from collections.abc import Iterable

from lrc.families import Architecture
from lrc.methods import methods
from lrc.methods.contract import Solver
from lrc.moments import statistics
from lrc.moments.gradient import GRADIENTS, GradientTargets, output_role
from lrc.moments.moment import Moments, site_of
from lrc.moments.statistic import Layer, Statistic
from lrc.plan.resolved import Assignment, LayerPlan, ResolvedPlan


def collectors_needed(plan: LayerPlan) -> set[str]:
    """Return the names of the statistics that the solvers of a layer need, with ``gradients`` if needed."""
    return {name for a in plan.assignments for name in solver_of(a).collectors(a.options)}


def sites_needed(architecture: Architecture, plan: LayerPlan) -> set[str]:
    """Return the sites whose moments the solvers of a layer read."""
    return {site_of(architecture.family, a.target) for a in plan.assignments}


def statistics_needed(layer: Layer, plan: LayerPlan, targets: Iterable[str] = ()) -> list[Statistic]:
    """Return empty accumulators for the statistics that a layer's solvers need, in the same order on all processes.

    Moments are of all targets of the plan and of ``targets``.
    """
    needed: dict[str, dict[str, None]] = {Moments.name: dict.fromkeys(targets)}
    for a in plan.assignments:
        for name in {Moments.name, *solver_of(a).collectors(a.options)} - {GRADIENTS}:
            needed.setdefault(name, {})[a.target] = None
    return [statistics()[name](layer, needed[name]) for name in sorted(needed)]


def gradients_needed(architecture: Architecture, plan: LayerPlan, *, losses: bool = False) -> GradientTargets:
    """Return which gradient moments the solvers of a layer read; with ``losses``, those of every target."""
    targets = {
        a.target for a in plan.assignments if losses or GRADIENTS in solver_of(a).collectors(a.options)
    }
    roles = frozenset(output_role(architecture.family, target) for target in targets - {"qk"})
    return GradientTargets(roles, "qk" in targets)


def reads_gradients(architecture: Architecture, plan: ResolvedPlan) -> bool:
    """Return whether the solvers of any layer read gradients."""
    return any(gradients_needed(architecture, layer) for layer in plan.layers)


def solver_of(assignment: Assignment) -> Solver:
    """Return the solver of an assignment."""
    solver = methods()[assignment.method].solver(assignment.target)
    assert solver is not None  # the plan assigns only what a method solves
    return solver
