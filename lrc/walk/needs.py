"""Statistics, sites and gradients that the solvers of a layer need."""

from __future__ import annotations

from lrc.families import Architecture
from lrc.methods import methods
from lrc.methods.contract import (
    Solver,
)
from lrc.moments.gradient import Wanted
from lrc.plan.resolved import Assignment, LayerPlan, ResolvedPlan

# The moment that a component's problem is posed on; a projection's is that of its own input.
COMPONENT_SITES = {"qk": "attn_in", "ov": "o_in", "mlp": "down_in"}


def collectors_needed(plan: LayerPlan) -> set[str]:
    """Statistics that the solvers of a layer read."""
    return {name for a in plan.assignments for name in solver_of(a).collectors(a.options)}


def sites_needed(architecture: Architecture, plan: LayerPlan) -> set[str]:
    """Sites whose moments the solvers of a layer read."""
    return {site_of(architecture, a.target) for a in plan.assignments}


def site_of(architecture: Architecture, target: str) -> str:
    """The site whose moment a target's problem is posed on."""
    return COMPONENT_SITES.get(target) or architecture.family.site(target)


def gradients_needed(architecture: Architecture, plan: LayerPlan, *, losses: bool = False) -> Wanted:
    """Gradient moments that the solvers of a layer read; with ``losses``, all that they can predict a loss from."""
    targets = {
        a.target for a in plan.assignments if losses or "gradients" in solver_of(a).collectors(a.options)
    }
    outputs = {"ov": "o", "mlp": architecture.family.mlp_output}
    return Wanted(frozenset(outputs.get(target, target) for target in targets - {"qk"}), "qk" in targets)


def reads_gradients(architecture: Architecture, plan: ResolvedPlan) -> bool:
    """Whether any layer's solvers read gradients."""
    return any(gradients_needed(architecture, layer) for layer in plan.layers)


def solver_of(assignment: Assignment) -> Solver:
    """The function of its method that solves an assignment."""
    solver = methods()[assignment.method].solver(assignment.target)
    assert solver is not None  # or it would not have been assigned
    return solver
