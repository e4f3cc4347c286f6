"""Whitened SVD: the pair that changes the projection's outputs least on the calibration text (SVD-LLM)."""

from __future__ import annotations

from lrc.methods.contract import ProjectionProblem, Solution, solves
from lrc.methods.pair import input_moment, pair_solution
from lrc.plan.size import PairRank


@solves(
    "projection",
    size=PairRank(),
    paper="SVD-LLM, arXiv:2403.07378; A3, arXiv:2505.12942, for one linear layer",
)
def solve_projection(problem: ProjectionProblem, rank: int) -> Solution:
    """Minimise E‖(W − W') x‖²: W' = U_r U_rᵀ W for the top eigenvectors U_r of W C Wᵀ."""
    return pair_solution(problem, rank, input_moment(problem))
