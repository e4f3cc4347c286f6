"""Working sets of solves and refits in float64, worked out from shapes: the larger part of what a compression takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrc.families import Architecture
from lrc.maths.linalg import COLUMN_BYTES
from lrc.methods import methods
from lrc.plan.resolved import Assignment, LayerPlan

ATTENTION_TARGETS = {"q", "k", "v", "o", "qk", "ov"}


def solve_work(architecture: Architecture, assignment: Assignment, sampled: int) -> int:
    """Float64 working set of one solve: the moment, its damped copy, what is multiplied and factored of it.

    ``sampled``: elements of the covariances that go with the sampled queries of one key head.
    """
    target, hidden, options = assignment.target, architecture.hidden, assignment.options
    if target == "mlp":
        output = architecture.matrices[architecture.family.mlp_output]
        n, kept = output.columns, assignment.size
        elimination = 3 * n**2 if options.get("select") == "obs" else 0
        # Rows and columns of C that stay, their factor and what is gathered of them; C itself only a part at a time.
        work = max(elimination, 5 * kept**2 // 2, 3 * _part(n) // 2)
        work = max(3 * n**2, n**2 + work) if output.bias else work
        return 8 * (work + 4 * hidden * n + 2 * hidden * kept + _metric_work(hidden, n, options))
    if target == "ov":
        biased = architecture.matrices["v"].bias or architecture.matrices["o"].bias
        n, kept = architecture.heads * architecture.head_dim, architecture.heads * assignment.size
        alternating = 2 * hidden * (n + kept) + 3 * n * kept if options.get("subspace") == "joint" else 0
        work = _joint_work(n, kept, biased) + n**2 + 2 * n * kept + 3 * hidden * n
        return 8 * (work + alternating + _metric_work(hidden, n, options))
    if target == "qk":
        return 8 * (2 * hidden**2 + 3 * architecture.heads * architecture.head_dim * hidden + 3 * sampled)
    matrix = architecture.matrices[target]
    solvers = methods()[assignment.method].solvers
    # Blind to the data, a method still needs the moment to predict what it does; others damp and factor it.
    metric = solvers["projection"].metric
    outer = 3 * matrix.rows**2 if metric == "loss" else 0
    copies = 1 if metric == "weight" else 4
    small = min(matrix.rows, matrix.columns)
    return 8 * (copies * matrix.columns**2 + outer + 4 * matrix.parameters + 5 * small**2)


def _metric_work(hidden: int, n: int, options: Mapping[str, Any]) -> int:
    """Elements of G, its root and the weight that it multiplies."""
    return 4 * hidden**2 + hidden * n if options.get("metric") == "loss" else 0


def _joint_work(n: int, kept: int, biased: bool) -> int:
    """Elements of a least-squares fit from ``kept`` of n inputs: C and its damped copy, C Tᵀ, T C Tᵀ and its factor."""
    return (3 if biased else 2) * n**2 + max(n**2, n * kept + 4 * kept**2)


def _part(n: int) -> int:
    """Elements of the columns of an n x n moment that are in float64 at once."""
    return min(n**2, COLUMN_BYTES // 8)


def refit_work(architecture: Architecture, n: int) -> int:
    """Sums and means in float32, of the blocks fitted to and those held out, and ridge regressions in float64 of a
    projection that reads n inputs: the moment fitted to centred where there is a bias, damped and factored.
    """
    hidden, biased = architecture.hidden, architecture.matrices[architecture.family.mlp_output].bias
    return 16 * n**2 + 8 * hidden * n + 8 * ((3 if biased else 2) * n**2 + _part(n) + 6 * hidden * n)


def refit_widths(architecture: Architecture, layer: LayerPlan) -> list[int]:
    """Inputs of the linears that are refitted: of the attention's half first, then of the MLP's."""
    found = []
    sizes = {a.target: a.size for a in layer.assignments}
    output = architecture.family.mlp_output
    if layer.targets & ATTENTION_TARGETS:
        full = architecture.heads * architecture.head_dim
        found.append(sizes.get("o", architecture.heads * sizes["ov"] if "ov" in sizes else full))
    if layer.targets - ATTENTION_TARGETS:
        found.append(sizes.get("mlp", sizes.get(output, architecture.matrices[output].columns)))
    return found
