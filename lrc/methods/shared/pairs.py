"""Share code between methods that store a projection or the embedding table as a low-rank pair."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lrc.maths.linalg import balanced, best_pair, data_error, data_errors
from lrc.methods.contract import EmbeddingProblem, Factors, Prediction, ProjectionProblem, Shapes, Solution
from lrc.moments.moment import Moment


def input_moment(problem: ProjectionProblem) -> Tensor:
    """Return C (n, n) of E‖ΔW x‖², centred if the projection has a bias: correcting it costs nothing."""
    return problem.input.second if problem.matrix.bias is None else problem.input.centred


def corrected_bias(problem: ProjectionProblem, delta: Tensor) -> Tensor | None:
    """Return b + ΔW E[x], the bias that makes the mean error of ΔW = W − W' zero."""
    bias = problem.matrix.bias
    return None if bias is None else bias.double() + delta @ problem.input.mean.double()


def predicted(problem: ProjectionProblem, delta: Tensor, c: Tensor) -> Prediction:
    """Return the ``prediction`` of a projection."""
    return prediction(problem.matrix.weight, problem.input, delta, c, problem.gradient)


def prediction(weight: Tensor, moment: Moment, delta: Tensor, c: Tensor, g: Tensor | None) -> Prediction:
    """Predict E‖ΔW x‖² for x of moment C, E‖W x‖² and, with gradients, the loss ½ tr(G ΔW C ΔWᵀ)."""
    error, *twice = data_errors(delta, c, None, *([] if g is None else [g]))
    return Prediction(error, data_error(weight, moment.second), "output", twice[0] / 2 if twice else None)


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


def table_solution(
    problem: EmbeddingProblem, b: Tensor, a: Tensor, numerics: Mapping[str, float] | None = None
) -> Solution:
    """Return the table B (tokens, rank) A (rank, hidden) with its error."""
    b, a = balanced(b, a)
    return Solution(
        parts={"embed": Factors("embedding", {"A": a, "B": b})},
        predicted=table_error(problem, problem.table.double() - b @ a),
        numerics=numerics or {},
    )


def table_error(problem: EmbeddingProblem, delta: Tensor) -> Prediction:
    """Return the squared error Σ f_t ‖δ_t‖² of a change Δ (tokens, hidden) of the table.

    With a tied head, return the mean of the squared relative errors of the embedding and of the head's E‖Δ h‖².
    """
    inner, outer = references(problem)
    error = _weighted(delta.double(), problem.frequency)
    if problem.final is None:
        return Prediction(error, inner, "output")
    output = data_error(delta, problem.final.second)
    return Prediction((error / inner + output / outer) / 2, 1.0, "output")


def references(problem: EmbeddingProblem) -> tuple[float, float]:
    """Return Σ f_t ‖e_t‖², and E‖E h‖² or 0 without a tied head."""
    table = problem.table.double()
    outer = 0.0 if problem.final is None else data_error(table, problem.final.second)
    return _weighted(table, problem.frequency), outer


def _weighted(rows: Tensor, frequency: Tensor) -> float:
    return float(frequency.double() @ rows.square().sum(dim=-1))
