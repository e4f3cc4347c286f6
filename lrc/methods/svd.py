"""Truncated SVD: the best pair in the Frobenius norm; only the bias depends on the calibration text."""

from __future__ import annotations

from lrc.maths.linalg import best_pair
from lrc.methods.contract import EmbeddingProblem, ProjectionProblem, Solution, solves
from lrc.methods.shared.pairs import pair_memory, pair_solution, table_solution
from lrc.methods.sizes import PairRank


@solves(
    "projection",
    size=PairRank(),
    metric="weight",
    paper="Eckart and Young 1936; Mirsky 1960",
    # The solve ignores the data, but predicting its error needs the moment.
    memory=lambda shapes, size, options: pair_memory(shapes, moments=1, gradients=0),
)
def solve_projection(problem: ProjectionProblem, rank: int) -> Solution:
    """Return W_r = U_r Σ_r V_rᵀ, whose squared weight error is Σ_{i>r} σ_i².

    The moment only predicts the output error and corrects a bias by the mean error.
    """
    return pair_solution(problem, rank, None)


@solves("embed", size=PairRank(), metric="weight", paper="Eckart and Young 1936; Mirsky 1960")
def solve_embedding(problem: EmbeddingProblem, rank: int) -> Solution:
    """Return the truncated SVD of the embedding table, with equal weight for all tokens."""
    b, a, _ = best_pair(problem.table, rank)
    return table_solution(problem, b, a)
