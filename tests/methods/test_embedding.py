"""Factorized tables of embeddings against optimisers that know nothing of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lrc.methods import methods
from lrc.methods.contract import EmbeddingProblem, Factors, Solution
from lrc.modules import kinds
from lrc.moments.moment import Moment

TOKENS, WIDTH, RANK = 40, 8, 3


@pytest.fixture
def problem() -> EmbeddingProblem:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = random(100, WIDTH) @ random(WIDTH, WIDTH)
    frequency = random(TOKENS).exp() ** 2
    return EmbeddingProblem(
        random(TOKENS, WIDTH) @ random(WIDTH, WIDTH),
        frequency / frequency.sum(),
        Moment(hidden.T @ hidden / 100, hidden.mean(dim=0), 100),
    )


def solve(method: str, problem: EmbeddingProblem, rank: int = RANK) -> Solution:
    return methods()[method].solvers["embed"].solve(problem, rank)


def product(solution: Solution) -> Tensor:
    (part,) = solution.parts.values()
    assert isinstance(part, Factors)
    return kinds()["low_rank"].dense(part.tensors)


def cost(problem: EmbeddingProblem, table: Tensor) -> Tensor:
    """What is minimised, over every token and every axis of the final hidden states apart."""

    def squares(rows: Tensor) -> tuple[Tensor, Tensor]:
        inner = (rows @ rows.T).diagonal() @ problem.frequency
        outer = torch.zeros(()) if problem.final is None else (rows @ problem.final.second @ rows.T).trace()
        return inner, outer

    (inner, outer), (inner_size, outer_size) = squares(problem.table - table), squares(problem.table)
    return inner if problem.final is None else (inner / inner_size + outer / outer_size) / 2


def descended(problem: EmbeddingProblem) -> float:
    """The least cost that gradient descent finds, from several random starts."""
    found = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        shapes = (TOKENS, RANK), (RANK, WIDTH)
        b, a = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
        optimizer = torch.optim.LBFGS(
            [b, a], max_iter=250, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def closure(b: Tensor = b, a: Tensor = a, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = cost(problem, b @ a)
            value.backward()
            return value.detach()

        optimizer.step(closure)
        found.append(float(cost(problem, (b @ a).detach())))
    return min(found)


def test_untied_it_is_the_least_error_by_frequency(problem):
    alone = replace(problem, final=None)
    solution = solve("whitened_svd", alone)
    assert solution.predicted.error == pytest.approx(float(cost(alone, product(solution))))
    assert solution.predicted.error == pytest.approx(descended(alone), rel=1e-6)


def test_tied_it_is_the_least_sum_of_both_errors(problem):
    solution = solve("whitened_svd", problem)
    assert solution.predicted.error == pytest.approx(float(cost(problem, product(solution))))
    assert solution.predicted.error == pytest.approx(descended(problem), rel=1e-4)


def test_plain_svd_is_the_least_error_without_weights(problem):
    solution = solve("svd", problem)
    u, s, vt = torch.linalg.svd(problem.table, full_matrices=False)
    torch.testing.assert_close(product(solution), u[:, :RANK] * s[:RANK] @ vt[:RANK])
    assert solution.predicted.error == pytest.approx(float(cost(problem, product(solution))))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["svd", "whitened_svd"])
def test_it_is_exact_at_full_size_and_errors_fall_with_it(problem, method, tied):
    problem = problem if tied else replace(problem, final=None)
    errors = [solve(method, problem, rank).predicted.error for rank in range(1, WIDTH + 1)]
    assert errors == sorted(errors, reverse=True)
    torch.testing.assert_close(product(solve(method, problem, WIDTH)), problem.table)
    assert errors[-1] < 1e-20 * max(solve(method, problem, 1).predicted.reference, 1)


@pytest.mark.parametrize("tied", [True, False])
def test_the_data_never_lose_to_plain_svd(problem, tied):
    problem = problem if tied else replace(problem, final=None)
    for rank in range(1, WIDTH):
        ours, plain = (solve(method, problem, rank).predicted.error for method in ("whitened_svd", "svd"))
        assert ours < plain


def test_a_moment_of_few_tokens_is_enough(problem):
    hidden = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    few = replace(problem, final=Moment((hidden.T @ hidden / 3).float(), hidden.mean(dim=0).float(), 3))
    solution = solve("whitened_svd", few, 5)
    assert product(solution).isfinite().all()
    assert solution.predicted.error < solve("svd", few, 5).predicted.error
