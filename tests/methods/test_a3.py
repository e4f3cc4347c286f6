from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lrc.families import Heads
from lrc.methods.a3 import solve_mlp, solve_ov, solve_qk
from lrc.methods.contract import Affine, QKProblem, Solution
from lrc.moments.moment import Moment


def root_of(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def per_head(matrix: Affine, moment: Moment, heads: int) -> Tensor:
    """E[y yᵀ] of every head's outputs, from a moment that is extended by a constant one."""
    n = len(moment.mean)
    extended = torch.ones(n + 1, n + 1).double()
    extended[:n, :n], extended[:n, n], extended[n, :n] = moment.second, moment.mean, moment.mean
    bias = torch.zeros(len(matrix.weight)).double() if matrix.bias is None else matrix.bias
    weights = torch.cat([matrix.weight, bias[:, None]], dim=1).unflatten(0, (heads, -1))
    return torch.stack([w @ extended @ w.T for w in weights])


def whole(solution: Solution, role: str) -> Affine:
    part = solution.parts[role]
    assert isinstance(part, Affine)
    return part


class TestQK:
    @pytest.mark.parametrize("rank", [1, 3, 5])
    def test_reaches_the_published_optimum_of_every_head(self, make_case, rank):
        case = make_case("qk", kv_heads=4, bias=True)
        problem = case.problem
        q, k = (per_head(m, problem.input, 4) for m in (problem.q, problem.k))
        spectra = [torch.linalg.svdvals(root_of(a) @ root_of(b)) for a, b in zip(q, k, strict=True)]
        expected = sum(float(s[rank:].square().sum()) for s in spectra)
        assert solve_qk(problem, rank, metric="score").predicted.error == pytest.approx(expected, rel=1e-4)

    def test_a_shared_key_head_gets_the_optimum_of_the_stack(self, make_case):
        case = make_case("qk", kv_heads=2, bias=True)
        q, k = (
            per_head(case.problem.q, case.problem.input, 4),
            per_head(case.problem.k, case.problem.input, 2),
        )
        expected = 0.0
        for head in range(2):
            root = root_of(k[head])
            stack = torch.cat([root_of(q[2 * head + i]) @ root for i in range(2)])
            expected += float(torch.linalg.svdvals(stack)[3:].square().sum())
        assert solve_qk(case.problem, 3, metric="score").predicted.error == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    @pytest.mark.parametrize("rank", [2, 4])
    def test_rotary_keeps_the_pairs_of_the_published_rule(self, make_case, kv_heads, rank):
        problem = make_case("qk", kv_heads=kv_heads, rotary="half", bias=True).problem
        q, k = per_head(problem.q, problem.input, 4), per_head(problem.k, problem.input, kv_heads)
        half, group = 3, 4 // kv_heads

        def energy(moment: Tensor, pair: int) -> float:
            return float(moment[pair, pair] + moment[pair + half, pair + half])

        columns = []
        for head in range(kv_heads):
            queries = q[head * group : (head + 1) * group]
            best = max(
                itertools.combinations(range(half), rank // 2),
                key=lambda kept: sum(
                    (energy(s, j) * energy(k[head], j)) ** 0.5 for s in queries for j in kept
                ),
            )
            columns.append([*best, *(j + half for j in best)])
        solution = solve_qk(problem, rank, metric="score")
        assert solution.rotary_columns is not None
        assert solution.rotary_columns.tolist() == columns
        for name, matrix, per in (("q", problem.q, group), ("k", problem.k, 1)):
            rows = torch.tensor([h * 6 + c for h in range(kv_heads * per) for c in columns[h // per]])
            part = whole(solution, name)
            assert torch.equal(part.weight, matrix.weight[rows])
            assert part.bias is not None
            assert matrix.bias is not None
            assert torch.equal(part.bias, matrix.bias[rows])

    def test_rotary_predicts_half_the_product_of_the_dropped_energies(self, make_case):
        case = make_case("qk", kv_heads=4, rotary="half")
        q, k = (
            per_head(m, case.problem.input, 4).diagonal(dim1=1, dim2=2)
            for m in (case.problem.q, case.problem.k)
        )
        solution = solve_qk(case.problem, 2, metric="score")
        assert solution.rotary_columns is not None
        expected = sum(
            float((q[h, j] + q[h, j + 3]) * (k[h, j] + k[h, j + 3])) / 2
            for h in range(4)
            for j in set(range(3)) - set(solution.rotary_columns[h].tolist())
        )
        assert solution.predicted.error == pytest.approx(expected, rel=1e-9)

    def test_rotary_adds_up_norms_not_their_squares(self):
        """Two queries of norms 4 and 0 on one pair, 3 and 2 on the other: 4 < 5, though 16 > 13."""
        sizes = torch.tensor([[4.0, 3.0, 0, 0], [0, 2.0, 0, 0]]).double()
        q, k = torch.block_diag(*sizes[:, :, None]), torch.tensor([[1.0, 1.0, 0, 0]]).double().T
        problem = QKProblem(
            Affine(q),
            Affine(k.expand(4, 2)),
            Heads(2, 1, 4, "half"),
            Moment(torch.eye(2).double(), torch.zeros(2).double(), 1),
        )
        solution = solve_qk(problem, 2, metric="score")
        assert solution.rotary_columns is not None
        assert solution.rotary_columns.tolist() == [[1, 3]]


class TestOV:
    def test_a_value_bias_folds_exactly_at_any_rank(self, make_case):
        """Only what is lost of the values' deviations is lost: shifting the bias changes no error."""
        case = make_case("ov", kv_heads=4, v_bias=True)
        problem = case.problem
        offset = 100 * torch.linspace(-1, 1, 24).double()
        shifted = replace(
            problem,
            v=Affine(problem.v.weight, problem.v.bias + offset),
            output=problem.output.shifted(-offset),
        )
        for refit in ("least_squares", "none"):
            one, other = (solve_ov(p, 2, refit=refit) for p in (problem, shifted))
            assert other.predicted.error == pytest.approx(one.predicted.error, rel=1e-6)
            assert whole(other, "v").bias is None
            torch.testing.assert_close(whole(other, "o").weight, whole(one, "o").weight, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(
                whole(other, "o").bias, whole(one, "o").bias + problem.o.weight @ offset, rtol=1e-6, atol=1e-6
            )

    @pytest.mark.parametrize("facts", [{}, {"v_bias": True}, {"o_bias": True}])
    @pytest.mark.parametrize("kv_heads", [4, 2])
    def test_the_joint_refit_is_least_squares_on_the_tokens(self, make_case, kv_heads, facts):
        case = make_case("ov", kv_heads=kv_heads, **facts)
        solution = solve_ov(case.problem, 2)
        best = case.measured(solution)
        # No small change of the output projection (or its bias) lowers the error.
        part = whole(solution, "o")
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            step = 1e-3 * torch.randn(part.weight.shape, generator=generator, dtype=torch.float64)
            shift = None if part.bias is None else part.bias + step[:, 0]
            for sign in (1, -1):
                moved = Affine(part.weight + sign * step, shift)
                assert case.measured(replace(solution, parts={**solution.parts, "o": moved})) > best
        assert best < case.measured(solve_ov(case.problem, 2, refit="none"))

    def test_without_refit_every_head_has_its_own_optimum(self, make_case):
        """One query head a value head: O_h S_h^½ cut to its first singular values, S_h centred."""
        problem = make_case("ov", kv_heads=4, v_bias=True, o_bias=True).problem
        solution = solve_ov(problem, 2, refit="none")
        moment, change = problem.output.centred, 0.0
        values, output = (whole(solution, r).weight for r in ("v", "o"))
        for head in range(4):
            rows = slice(6 * head, 6 * head + 6)
            own = root_of(moment[rows, rows])
            o, v = problem.o.weight[:, rows], problem.v.weight[rows]
            u, s, vt = torch.linalg.svd(o @ own, full_matrices=False)
            product = (u[:, :2] * s[:2]) @ vt[:2] @ torch.linalg.inv(own) @ v
            kept = slice(2 * head, 2 * head + 2)
            torch.testing.assert_close(output[:, kept] @ values[kept], product, rtol=1e-4, atol=1e-4)
            change += float(s[2:].square().sum())
        assert change > 0

    @pytest.mark.parametrize("kv_heads", [2, 1])
    def test_shared_values_keep_what_the_stack_of_their_readers_needs(self, make_case, kv_heads):
        """The row space is that of the stack of O_h S̄^½ cut to its first singular values, S̄ the group's mean."""
        problem = make_case("ov", kv_heads=kv_heads).problem
        values, group = whole(solve_ov(problem, 2), "v").weight, 4 // kv_heads
        for head in range(kv_heads):
            cuts = [slice(6 * h, 6 * h + 6) for h in range(head * group, (head + 1) * group)]
            root = root_of(torch.stack([problem.output.second[cut, cut] for cut in cuts]).mean(dim=0))
            vt = torch.linalg.svd(torch.cat([problem.o.weight[:, cut] @ root for cut in cuts]))[2][:2]
            expected = vt @ torch.linalg.inv(root) @ problem.v.weight[6 * head : 6 * head + 6]
            bases = [torch.linalg.qr(m.T)[0] for m in (expected, values[2 * head : 2 * head + 2])]
            overlap = torch.linalg.svdvals(bases[0].T @ bases[1])
            torch.testing.assert_close(overlap, torch.ones(2).double(), rtol=0, atol=1e-6)


class TestMLP:
    def test_keeps_the_largest_scores_of_the_published_rule(self, make_case):
        for facts in ({"gated": True}, {"gated": False, "bias": True}):
            problem = make_case("mlp", **facts).problem
            moment = problem.hidden.second if "bias" not in facts else problem.hidden.centred
            score = moment.diagonal().sqrt() * problem.output.weight.square().sum(dim=0).sqrt()
            expected = sorted(sorted(range(16), key=lambda i: -float(score[i]))[:5])
            solution = solve_mlp(problem, 5, select="score")
            assert solution.neurons is not None
            assert solution.neurons.tolist() == expected
            for role, matrix in problem.inputs.items():
                assert torch.equal(whole(solution, role).weight, matrix.weight[expected])
                if matrix.bias is not None:
                    torch.testing.assert_close(whole(solution, role).bias, matrix.bias[expected])

    @pytest.mark.parametrize("facts", [{"gated": True}, {"gated": False, "bias": True}])
    def test_the_refit_is_least_squares_on_the_tokens(self, make_case, facts):
        case = make_case("mlp", **facts)
        solution, published = solve_mlp(case.problem, 6), solve_mlp(case.problem, 6, refit="none")
        best, role = case.measured(solution), case.problem.output_role
        part = whole(solution, role)
        for seed in range(4):
            step = (
                1e-3 * torch.randn(part.weight.shape, generator=torch.Generator().manual_seed(seed)).double()
            )
            for sign in (1, -1):
                shift = None if part.bias is None else part.bias + sign * step[:, 0]
                moved = Affine(part.weight + sign * step, shift)
                assert case.measured(replace(solution, parts={**solution.parts, role: moved})) > best
        assert published.predicted.error == pytest.approx(case.measured(published), rel=1e-6)
        assert best < published.predicted.error
        kept = solution.neurons
        assert torch.equal(whole(published, role).weight, case.problem.output.weight[:, kept])
