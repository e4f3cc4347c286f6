"""Poses a layer's problems from its weights and moments, and has the plan's methods solve them."""

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
from lrc.plan.resolved import Assignment, LayerPlan
from lrc.run.processes import ALONE, Ranks
from lrc.walk.needs import (
    solver_of,
)
from lrc.walk.statistics import Statistics


def solve_layer(
    architecture: Architecture,
    plan: LayerPlan,
    state: Mapping[str, Tensor],
    statistics: Statistics,
    ranks: Ranks = ALONE,
) -> dict[str, Solution]:
    """Solve everything a plan asks of one layer, by target, from its tensors and statistics.

    Each is solved by one process, so that all have the same to the bit.
    """

    def solution(assignment: Assignment) -> Solution:
        return solve(pose(architecture, assignment.target, state, statistics), assignment)

    targets = [assignment.target for assignment in plan.assignments]
    return dict(zip(targets, ranks.spread(plan.assignments, solution), strict=True))


def solve(problem: Problem, assignment: Assignment) -> Solution:
    """Solve one problem as an assignment asks."""
    return solver_of(assignment).solve(problem, assignment.size, **assignment.options)


def pose(
    architecture: Architecture, target: str, state: Mapping[str, Tensor], statistics: Statistics
) -> Problem:
    """The problem of one target of a layer, from its tensors and statistics."""
    family, heads, moments = architecture.family, architecture.geometry, statistics.moments
    gradients = statistics.gradients

    def affine(role: str) -> Affine:
        return Affine(*canonical(family, architecture, state, role))

    def gradient(role: str) -> Tensor | None:
        return gradients and gradients.outputs.get(role)

    if target == "qk":
        queries = gradients and gradients.queries
        return QKProblem(affine("q"), affine("k"), heads, moments["attn_in"], statistics.attention, queries)
    if target == "ov":
        return OVProblem(affine("v"), affine("o"), heads, moments["o_in"], gradient("o"))
    if target == "mlp":
        inputs, role = {role: affine(role) for role in family.mlp_inputs}, family.mlp_output
        return MLPProblem(inputs, role, affine(role), moments["down_in"], gradient(role))
    return ProjectionProblem(target, affine(target), moments[family.site(target)], gradient(target))
