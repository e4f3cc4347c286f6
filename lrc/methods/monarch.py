"""Monarch: the matrix cut into a grid of blocks, each a low-rank pair, run as two block-diagonal products."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge

from lrc.families import Target
from lrc.maths.linalg import DAMPING, best_pair, damped, damped_cholesky
from lrc.methods.contract import Factors, ProjectionProblem, Solution, solves
from lrc.methods.shared.pairs import corrected_bias, input_moment, predicted
from lrc.methods.sizes import Options, Rank, most

BLOCKS = 4
Blocks = Annotated[int, Ge(1)]
Rounds = Annotated[int, Ge(0)]


class MonarchRank(Rank):
    """Rank of every block of a ``blocks`` × ``blocks`` grid."""

    def full(self, target: Target, options: Options) -> int:
        (matrix,) = target.matrices.values()
        return min(matrix.rows, matrix.columns) // options.get("blocks", BLOCKS)

    def nearest(self, target: Target, keep: float, options: Options) -> int:
        return max(most(keep, target.parameters) // self.unit(target, options), 1)

    def refusal(self, target: Target, size: Any, options: Options) -> str | None:
        (matrix,) = target.matrices.values()
        blocks = options.get("blocks", BLOCKS)
        if blocks < 1 or matrix.rows % blocks or matrix.columns % blocks:
            divisors = [d for d in range(1, 65) if matrix.rows % d == 0 and matrix.columns % d == 0]
            return f"blocks {blocks} does not divide {matrix.rows} x {matrix.columns}; these do: {divisors}"
        if size > self.full(target, options):
            return f"rank {size} is above the full rank of a block; it has {self.full(target, options)}"
        if self.weights(target, size, options) > target.parameters:
            largest = target.parameters // self.unit(target, options)
            return f"blocks of rank {size} are larger than the matrix itself; the largest that are not have {largest}"
        return super().refusal(target, size, options)

    def unit(self, target: Target, options: Options) -> int:
        return target.unit * options.get("blocks", BLOCKS)


@solves("projection", size=MonarchRank(), paper="Monarch, arXiv:2204.00595, in the metric of the inputs")
def solve_projection(
    problem: ProjectionProblem, rank: int, *, blocks: Blocks = BLOCKS, rounds: Rounds = 4
) -> Solution:
    """Minimise E‖(W − W') x‖² over grids of rank-r blocks by block coordinate descent.

    The start is the whitened SVD of every block, optimal for a block-diagonal C. Then each of ``rounds`` sweeps solves
    one column group k after another: the best blocks for T_k = W_k + (Σ_{l≠k} (W − W')_l C_lk) C_kk⁻¹. C is damped, and
    C_kk again by ``block_damping`` to solve its blocks. Without the second damping, steps are exact and the error in
    the damped moment never rises.
    """
    weight = problem.matrix.weight.double()
    c = damped(input_moment(problem))
    grid = weight.unflatten(0, (blocks, -1)).unflatten(2, (blocks, -1)).transpose(1, 2)  # (j, k, s, p)
    moment = c.unflatten(0, (blocks, -1)).unflatten(2, (blocks, -1)).transpose(1, 2)  # (l, k, p, p)
    pairs = [best_pair(grid[:, k], rank, moment[k, k]) for k in range(blocks)]
    found = torch.stack([b @ a for b, a, _ in pairs], dim=1)
    roots = [damped_cholesky(moment[k, k], damping=0.0) for k in range(blocks)]
    for _ in range(rounds):
        for k in range(blocks):
            rest = grid - found
            rest[:, k] = 0
            pull = torch.einsum("jlsp,lpq->jsq", rest, moment[:, k])
            target = grid[:, k] + roots[k].solve(pull)
            pairs[k] = best_pair(target, rank, moment[k, k])
            found[:, k] = pairs[k][0] @ pairs[k][1]
    delta = weight - found.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    factors = {
        "L": torch.stack([b for b, _, _ in pairs], dim=2).flatten(2, 3),  # (j, s, k·r)
        "R": torch.stack([a.flatten(0, 1) for _, a, _ in pairs]),  # (k, j·r, p)
    }
    return Solution(
        parts={problem.role: Factors("monarch", factors, corrected_bias(problem, delta))},
        predicted=predicted(problem, delta, input_moment(problem)),
        numerics={
            "damping": DAMPING,
            "block_damping": max(*(each.damping for each in roots), *(damping for *_, damping in pairs)),
        },
    )
