from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lrc.families import Matrix, Target
from lrc.maths.linalg import data_error
from lrc.methods.contract import Factors, ProjectionProblem
from lrc.methods.monarch import MonarchRank, solve_projection
from lrc.modules.monarch import MonarchLinear


def blockwise(problem: ProjectionProblem, rank: int, blocks: int, scale: Tensor) -> float:
    """Data error of truncated SVD of every block, its columns scaled by the square roots of a diagonal moment."""
    weight = problem.matrix.weight
    rows, columns = weight.shape
    delta, s, p = weight.clone(), rows // blocks, columns // blocks
    for j in range(blocks):
        for k in range(blocks):
            cut, own = (slice(j * s, j * s + s), slice(k * p, k * p + p)), scale[k * p : k * p + p]
            u, sigma, vt = torch.linalg.svd(weight[cut] * own, full_matrices=False)
            delta[cut] -= (u[:, :rank] * sigma[:rank]) @ vt[:rank] / own
    moment = problem.input.second if problem.matrix.bias is None else problem.input.centred
    return data_error(delta, moment)


@pytest.mark.parametrize("facts", [{"rows": 16, "columns": 24}, {"rows": 24, "columns": 16, "bias": True}])
@pytest.mark.parametrize("blocks", [2, 4])
def test_every_sweep_lowers_the_error(make_case, facts, blocks):
    case = make_case("projection", **facts)
    errors = []
    for rounds in (0, 1, 2, 4, 8):
        solution = solve_projection(case.problem, 1, blocks=blocks, rounds=rounds)
        assert solution.predicted.error == pytest.approx(case.measured(solution), rel=1e-6)
        errors.append(solution.predicted.error)
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-6)
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("facts", [{"rows": 16, "columns": 24}, {"rows": 24, "columns": 16, "bias": True}])
def test_beats_blocks_cut_by_plain_or_diagonally_scaled_svd(make_case, facts):
    problem = make_case("projection", **facts).problem
    found = solve_projection(problem, 1, blocks=4).predicted.error
    plain = blockwise(problem, 1, 4, torch.ones(facts["columns"]).double())
    diagonal = blockwise(problem, 1, 4, problem.input.second.diagonal().sqrt())
    assert found < 0.9 * min(plain, diagonal)


def test_blocks_are_cut_in_the_moment_with_the_damping_that_is_told(make_case):
    """Tokens of widely spread sizes, fewer than dimensions, so that the damping decides."""
    problem = make_case("projection", rows=8, columns=24, hard=True).problem
    solution = solve_projection(problem, 1, blocks=2, rounds=0)
    part, weight, c = solution.parts["o"], problem.matrix.weight, problem.input.second
    assert isinstance(part, Factors)
    c = c + solution.numerics["damping"] * c.diagonal().mean() * torch.eye(24).double()
    found = MonarchLinear.dense(part.tensors)
    for k in (0, 1):
        cut = slice(12 * k, 12 * k + 12)
        own = c[cut, cut]
        own = own + solution.numerics["block_damping"] * own.diagonal().mean() * torch.eye(12).double()
        root = torch.linalg.cholesky(own)
        for j in (0, 1):
            rows = slice(4 * j, 4 * j + 4)
            u, s, vt = torch.linalg.svd(weight[rows, cut] @ root, full_matrices=False)
            best = s[0] * torch.outer(u[:, 0], vt[0]) @ torch.linalg.inv(root)
            torch.testing.assert_close(found[rows, cut], best, rtol=1e-6, atol=1e-6)


def test_one_block_is_a_whitened_svd(make_case):
    from lrc.methods.whitened_svd import solve_projection as whitened

    problem = make_case("projection", rows=16, columns=24, bias=True).problem
    one, pair = solve_projection(problem, 3, blocks=1), whitened(problem, 3)
    part, other = one.parts["o"], pair.parts["o"]
    assert isinstance(part, Factors)
    assert isinstance(other, Factors)
    dense = other.tensors["B"] @ other.tensors["A"]
    torch.testing.assert_close(MonarchLinear.dense(part.tensors), dense, rtol=1e-4, atol=1e-4)
    assert one.predicted.error == pytest.approx(pair.predicted.error, rel=1e-5)


def test_sizes_count_the_factors_and_refuse_what_does_not_fit():
    rule, target = MonarchRank(), Target("o", {"o": Matrix(16, 24, False)}, 16, 1, 40)
    assert rule.full(target, {"blocks": 2}) == 8
    assert rule.weights(target, 2, {}) == 2 * 4 * 40
    assert rule.nearest(target, 0.5, {"blocks": 2}) == 2
    assert rule.refusal(target, 2, {"blocks": 4}) is None
    for size, blocks, words in [
        (1, 5, "does not divide"),
        (0, 4, "keeps nothing"),
        (9, 2, "above the full rank"),
    ]:
        assert words in (rule.refusal(target, size, {"blocks": blocks}) or "")
    assert "largest that are not have 2" in (rule.refusal(target, 3, {"blocks": 4}) or "")
