"""What the methods that store one projection as a low-rank pair share."""

from __future__ import annotations

from torch import Tensor

from lrc.linalg import best_pair, data_error
from lrc.methods.contract import Factors, Prediction, ProjectionProblem, Solution


def input_moment(problem: ProjectionProblem) -> Tensor:
    """The (n, n) matrix C of E‖ΔW x‖²: centred where the projection has a bias to correct, which is better and free."""
    return problem.input.second if problem.matrix.bias is None else problem.input.centred


def corrected_bias(problem: ProjectionProblem, delta: Tensor) -> Tensor | None:
    """b + ΔW E[x]: the bias that makes a change ΔW = W − W' right on average."""
    bias = problem.matrix.bias
    return None if bias is None else bias.double() + delta @ problem.input.mean.double()


def reference(problem: ProjectionProblem) -> float:
    """E‖W x‖², what a squared data error is held against."""
    return data_error(problem.matrix.weight, problem.input.second)


def pair_solution(
    problem: ProjectionProblem, rank: int, c: Tensor | None, g: Tensor | None = None
) -> Solution:
    """The best pair in the metric of C and G, with the bias corrected where C is of the data."""
    weight, bias = problem.matrix.weight.double(), problem.matrix.bias
    b, a, damping = best_pair(weight, rank, c, g)
    delta = weight - b @ a
    if c is None:
        error = data_error(delta, problem.input.second)
    else:
        error, bias = data_error(delta, c), corrected_bias(problem, delta)
    loss = None if g is None or c is None else float(((g.double() @ delta @ c.double()) * delta).sum()) / 2
    return Solution(
        parts={problem.role: Factors("low_rank", {"A": a, "B": b}, bias)},
        predicted=Prediction(error, reference(problem), "output", loss),
        numerics={"damping": damping},
    )
