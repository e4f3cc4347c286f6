"""Whitened SVD: the pair that changes the projection's outputs least on the calibration text (SVD-LLM)."""

from __future__ import annotations

import torch

from lrc.maths.alternating import shared_table
from lrc.maths.linalg import best_projector
from lrc.methods.contract import EmbeddingProblem, ProjectionProblem, Solution, solves
from lrc.methods.shared.pairs import input_moment, pair_solution, references, table_solution
from lrc.methods.sizes import PairRank


@solves(
    "projection",
    size=PairRank(),
    paper="SVD-LLM, arXiv:2403.07378; A3, arXiv:2505.12942, for one linear layer",
)
def solve_projection(problem: ProjectionProblem, rank: int) -> Solution:
    """Minimise E‖(W − W') x‖²: W' = U_r U_rᵀ W for the top eigenvectors U_r of W C Wᵀ."""
    return pair_solution(problem, rank, input_moment(problem))


@solves(
    "embed", size=PairRank(), paper="GroupReduce, arXiv:1806.06950, for one group; alternating where tied"
)
def solve_embedding(problem: EmbeddingProblem, rank: int) -> Solution:
    """Minimise Σ_t f_t ‖e_t − e'_t‖² over tokens t of frequency f_t.

    With a tied head, minimise the sum of this and E‖(E − E') h‖², each relative to the size of its output. The sum has
    no closed form: iterate from the best table in the metric ‖F^½ (E − E') C^½‖, C = E[h hᵀ].
    """
    table, frequency, final = problem.table.double(), problem.frequency.double(), problem.final
    h = table.mT @ (frequency.unsqueeze(-1) * table)
    start = best_projector(None if final is None else final.second, h, rank)
    if final is None:
        return table_solution(problem, table @ start.up, start.down)
    inner, outer = references(problem)
    maps, rounds = shared_table(
        table, frequency / inner, torch.full_like(frequency, 1 / outer), final.second, start.down
    )
    numerics = {"damping": start.damping, "rounds": rounds, "rounds_damping": maps.damping}
    return table_solution(problem, maps.up, maps.down, numerics)
