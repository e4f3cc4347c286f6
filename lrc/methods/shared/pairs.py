"""Share code between methods that store a projection as a low-rank pair."""

from __future__ import annotations

from torch import Tensor

from lrc.maths.linalg import best_pair, data_error, data_errors
from lrc.methods.contract import Factors, Prediction, ProjectionProblem, Shapes, Solution


def input_moment(problem: ProjectionProblem) -> Tensor:
    """Return C (n, n) of E‖ΔW x‖², centred if the projection has a bias: correcting it costs nothing."""
    return problem.input.second if problem.matrix.bias is None else problem.input.centred


def corrected_bias(problem: ProjectionProblem, delta: Tensor) -> Tensor | None:
    """Return b + ΔW E[x], the bias that makes the mean error of ΔW = W − W' zero."""
    bias = problem.matrix.bias
    return None if bias is None else bias.double() + delta @ problem.input.mean.double()


def predicted(problem: ProjectionProblem, delta: Tensor, c: Tensor) -> Prediction:
    """Predict E‖ΔW x‖² for x of moment C, E‖W x‖² and, with gradients, the loss ½ tr(G ΔW C ΔWᵀ)."""
    error, loss = errors(delta, c, problem.gradient)
    return Prediction(error, data_error(problem.matrix.weight, problem.input.second), "output", loss)


def errors(delta: Tensor, c: Tensor, g: Tensor | None) -> tuple[float, float | None]:
    """Return E‖ΔW x‖² for x of moment C, and ½ tr(G ΔW C ΔWᵀ) or None without G."""
    if g is None:
        return data_error(delta, c), None
    error, twice = data_errors(delta, c, None, g)
    return error, twice / 2


def pair_solution(
    problem: ProjectionProblem, rank: int, c: Tensor | None, g: Tensor | None = None
) -> Solution:
    """Return the best pair in the metric of C and G, with a corrected bias; None is the identity."""
    weight = problem.matrix.weight.double()
    b, a, damping = best_pair(weight, rank, c, g)
    delta = weight - b @ a
    return Solution(
        parts={problem.role: Factors("low_rank", {"A": a, "B": b}, corrected_bias(problem, delta))},
        predicted=predicted(problem, delta, input_moment(problem)),
        numerics={"damping": damping},
    )


def pair_memory(shapes: Shapes, moments: int, gradients: int) -> int:
    """Return the bytes of a float64 solve for a pair, with ``moments`` copies of C and ``gradients`` copies of G."""
    (matrix,) = shapes.target.matrices.values()
    copies = moments * matrix.columns**2 + gradients * matrix.rows**2
    return 8 * (copies + 4 * matrix.parameters + 5 * min(matrix.rows, matrix.columns) ** 2)
