"""Truncated SVD: the best pair in the Frobenius norm, blind to the data but for the bias."""

from __future__ import annotations

from lrc.maths.linalg import best_pair
from lrc.methods.contract import EmbeddingProblem, ProjectionProblem, Solution, solves
from lrc.methods.shared.pairs import pair_memory, pair_solution
from lrc.methods.shared.tables import table_solution
from lrc.methods.sizes import PairRank


@solves(
    "projection",
    size=PairRank(),
    metric="weight",
    paper="Eckart and Young 1936; Mirsky 1960",
    # Blind to the data, it still needs the moment to predict what it does.
    memory=lambda shapes, size, options: pair_memory(shapes, moments=1, gradients=0),
)
def solve_projection(problem: ProjectionProblem, rank: int) -> Solution:
    """W_r = U_r Σ_r V_rᵀ with squared weight error Σ_{i>r} σ_i².

    The moment only predicts what that does to outputs, and corrects a bias by the mean of what is lost.
    """
    return pair_solution(problem, rank, None)


@solves("embed", size=PairRank(), metric="weight", paper="Eckart and Young 1936; Mirsky 1960")
def solve_embedding(problem: EmbeddingProblem, rank: int) -> Solution:
    """The same for the table of embeddings, all tokens alike."""
    b, a, _ = best_pair(problem.table, rank)
    return table_solution(problem, b, a)
