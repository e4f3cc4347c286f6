"""Compute the float64 working sets of solves and refits, the larger part of a compression's memory, from shapes."""

from __future__ import annotations

from lrc.estimate.sizes import inner_width
from lrc.families import Architecture
from lrc.maths.linalg import column_part
from lrc.methods.contract import Shapes
from lrc.plan.resolved import Assignment, LayerPlan
from lrc.walk.needs import solver_of


def solve_work(architecture: Architecture, assignment: Assignment, sampled: int) -> int:
    """Return the bytes of one solve, as its method states them.

    ``sampled``: elements of the covariances of the sampled queries of one key head.
    """
    shapes = Shapes(architecture.targets[assignment.target], architecture.geometry, sampled)
    return solver_of(assignment).memory(shapes, assignment.size, assignment.options)


def refit_work(architecture: Architecture, n: int) -> int:
    """Return the bytes of the refit of a projection with n inputs.

    They are float32 sums and means of fitted and held-out blocks, and float64 ridge regressions: the moment, centred if
    there is a bias, damped and factored.
    """
    hidden, biased = architecture.hidden, architecture.matrices[architecture.family.mlp_output].bias
    return 16 * n**2 + 8 * hidden * n + 8 * ((3 if biased else 2) * n**2 + column_part(n) + 6 * hidden * n)


def refit_widths(architecture: Architecture, layer: LayerPlan) -> dict[str, int]:
    """Return the input width of each refitted linear, by the half of the layer that it ends."""
    inner = {a.target: inner_width(architecture, a) for a in layer.assignments}
    family = architecture.family
    by_component = {
        "attention": architecture.heads * inner.get("ov", architecture.head_dim),
        "mlp": inner.get("mlp", architecture.matrices[family.mlp_output].columns),
    }
    touched = [half for half in family.halves if layer.targets & half.targets]
    return {half.name: inner.get(half.output, by_component[half.name]) for half in touched}
