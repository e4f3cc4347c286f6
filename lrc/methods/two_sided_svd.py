"""Two-sided whitened SVD: the pair that raises the loss least, inputs and output gradients taken as independent."""

from __future__ import annotations

from lrc.methods.contract import ProjectionProblem, Solution, solves
from lrc.methods.shared.pairs import input_moment, pair_memory, pair_solution
from lrc.methods.sizes import PairRank


@solves(
    "projection",
    size=PairRank(),
    needs=("moments", "gradients"),
    metric="loss",
    memory=lambda shapes, size, options: pair_memory(shapes, moments=4, gradients=3),
    paper="Kronecker-factored curvature, arXiv:1503.05671, as the metric of a truncated SVD",
)
def solve_projection(problem: ProjectionProblem, rank: int) -> Solution:
    """Minimise ‖G^½ (W − W') C^½‖_F; half its square predicts the rise of the loss in nats for small changes."""
    return pair_solution(problem, rank, input_moment(problem), problem.gradient)
