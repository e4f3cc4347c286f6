"""Build a layer's problems from its weights and statistics, and solve them with the plan's methods."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lrc.families import Architecture, canonical
from lrc.methods.contract import (
    Affine,
    MLPProblem,
    OVProblem,
    Problem,
    ProjectionProblem,
    QKProblem,
    Solution,
)
from lrc.moments.gradient import GRADIENTS
from lrc.moments.moment import Moments
from lrc.moments.statistic import Found
from lrc.plan.resolved import Assignment, LayerPlan
from lrc.run.processes import ALONE, Processes
from lrc.walk.needs import solver_of


def solve_layer(
    architecture: Architecture,
    plan: LayerPlan,
    state: Mapping[str, Tensor],
    found: Found,
    processes: Processes = ALONE,
) -> dict[str, Solution]:
    """Return the solution of each target of a layer, from its tensors and statistics.

    One process solves each target, so that all have the same bits.
    """

    def solution(assignment: Assignment) -> Solution:
        return solve(make_problem(architecture, assignment.target, state, found), assignment)

    targets = [assignment.target for assignment in plan.assignments]
    return dict(zip(targets, processes.spread(plan.assignments, solution), strict=True))


def solve(problem: Problem, assignment: Assignment) -> Solution:
    """Solve a problem with the method, size and options of an assignment."""
    return solver_of(assignment).solve(problem, assignment.size, **assignment.options)


def make_problem(
    architecture: Architecture, target: str, state: Mapping[str, Tensor], found: Found
) -> Problem:
    """Return the problem of one target of a layer, from the layer's tensors and statistics."""
    family, heads = architecture.family, architecture.geometry
    own = {name: by_target[target] for name, by_target in found.items() if target in by_target}
    moment, gradient = own[Moments.name], own.get(GRADIENTS)

    def affine(role: str) -> Affine:
        return Affine(*canonical(family, architecture, state, role))

    if target == "qk":
        return QKProblem(affine("q"), affine("k"), heads, moment, gradient, own)
    if target == "ov":
        return OVProblem(affine("v"), affine("o"), heads, moment, gradient, own)
    if target == "mlp":
        inputs, role = {role: affine(role) for role in family.mlp_inputs}, family.mlp_output
        return MLPProblem(inputs, role, affine(role), moment, gradient, own)
    return ProjectionProblem(target, affine(target), moment, gradient, own)
