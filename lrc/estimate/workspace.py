"""Working sets of solves and refits in float64, worked out from shapes: the larger part of what a compression takes."""

from __future__ import annotations

from lrc.estimate.sizes import inner_width
from lrc.families import Architecture
from lrc.maths.linalg import column_part
from lrc.methods.contract import Shapes
from lrc.plan.resolved import Assignment, LayerPlan
from lrc.walk.needs import solver_of


def solve_work(architecture: Architecture, assignment: Assignment, sampled: int) -> int:
    """Return the bytes that one solve takes, as its method states them.

    ``sampled``: elements of the covariances that go with the sampled queries of one key head.
    """
    shapes = Shapes(architecture.targets[assignment.target], architecture.geometry, sampled)
    return solver_of(assignment).memory(shapes, assignment.size, assignment.options)


def refit_work(architecture: Architecture, n: int) -> int:
    """Return the bytes of the refit of a projection that reads n inputs.

    Sums and means in float32, of the blocks fitted to and those held out, and ridge regressions in float64: the moment
    fitted to, centred where there is a bias, damped and factored.
    """
    hidden, biased = architecture.hidden, architecture.matrices[architecture.family.mlp_output].bias
    return 16 * n**2 + 8 * hidden * n + 8 * ((3 if biased else 2) * n**2 + column_part(n) + 6 * hidden * n)


def refit_widths(architecture: Architecture, layer: LayerPlan) -> dict[str, int]:
    """Return the inputs of the linears that are refitted, by the half of the layer that each closes."""
    inner = {a.target: inner_width(architecture, a) for a in layer.assignments}
    family = architecture.family
    by_component = {
        "attention": architecture.heads * inner.get("ov", architecture.head_dim),
        "mlp": inner.get("mlp", architecture.matrices[family.mlp_output].columns),
    }
    touched = [half for half in family.halves if layer.targets & half.targets]
    return {half.name: inner.get(half.output, by_component[half.name]) for half in touched}
