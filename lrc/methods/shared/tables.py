"""Share code between methods that factorize the embedding table."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lrc.maths.linalg import balanced, data_error
from lrc.methods.contract import EmbeddingProblem, Factors, Prediction, Solution


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
