"""Poses a layer's problems from its weights and moments, and has the plan's methods solve them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lrc.families import Architecture, canonical
from lrc.methods import methods
from lrc.methods.contract import (
    Affine,
    MLPProblem,
    OVProblem,
    Problem,
    ProjectionProblem,
    QKProblem,
    Solution,
)
from lrc.moments.moment import Moment
from lrc.plan.resolved import LayerPlan

# The moment that a component's problem is posed on; a projection's is that of its own input.
COMPONENT_SITES = {"qk": "attn_in", "ov": "o_in", "mlp": "down_in"}


def sites_needed(architecture: Architecture, plan: LayerPlan) -> set[str]:
    """Sites whose moments the solvers of a layer read."""
    family = architecture.family
    return {COMPONENT_SITES.get(a.target) or family.site(a.target) for a in plan.assignments}


def solve_layer(
    architecture: Architecture, plan: LayerPlan, state: Mapping[str, Tensor], moments: Mapping[str, Moment]
) -> dict[str, Solution]:
    """Solve everything a plan asks of one layer, by target, from its tensors and the moments by site."""
    found = {}
    for assignment in plan.assignments:
        solvers = methods()[assignment.method].solvers
        solver = solvers.get(assignment.target) or solvers["projection"]
        problem = _pose(architecture, assignment.target, state, moments)
        found[assignment.target] = solver.solve(problem, assignment.size, **assignment.options)
    return found


def _pose(
    architecture: Architecture, target: str, state: Mapping[str, Tensor], moments: Mapping[str, Moment]
) -> Problem:
    family, heads = architecture.family, architecture.geometry

    def affine(role: str) -> Affine:
        return Affine(*canonical(family, architecture, state, role))

    if target == "qk":
        return QKProblem(affine("q"), affine("k"), heads, moments["attn_in"])
    if target == "ov":
        return OVProblem(affine("v"), affine("o"), heads, moments["o_in"])
    if target == "mlp":
        inputs = {role: affine(role) for role in family.mlp_inputs}
        return MLPProblem(inputs, family.mlp_output, affine(family.mlp_output), moments["down_in"])
    return ProjectionProblem(target, affine(target), moments[family.site(target)])
