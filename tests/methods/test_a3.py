from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lrc.families import Heads
from lrc.methods.a3 import solve_mlp, solve_ov, solve_qk
from lrc.methods.contract import Affine, MLPProblem, OVProblem, QKProblem, Solution
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


def kept_columns(problem: QKProblem, columns: Tensor, solution: Solution) -> Solution:
    """The solution that keeps these columns of every key head, in the same metric."""
    group, dim = problem.heads.group, problem.heads.head_dim
    parts = {}
    for name, matrix, per in (("q", problem.q, group), ("k", problem.k, 1)):
        rows = torch.cat([columns[h // per] + h * dim for h in range(len(columns) * per)])
        parts[name] = Affine(matrix.weight[rows], None if matrix.bias is None else matrix.bias[rows])
    return replace(solution, parts=parts, rotary_columns=columns)


def own_errors(problem: OVProblem, solution: Solution, root: Tensor, kv_heads: int) -> float:
    """Σ_h ‖root (O_h − O'_h T) S_h^½‖², head by head, T found from what became of the values."""
    total, rank = 0.0, len(whole(solution, "v").weight) // kv_heads
    for head in range(4):
        kv, cut, kept = (
            head * kv_heads // 4,
            slice(6 * head, 6 * head + 6),
            slice(rank * head, rank * head + rank),
        )
        values = problem.v.weight[6 * kv : 6 * kv + 6]
        new = whole(solution, "v").weight[rank * kv : rank * kv + rank]
        down = torch.linalg.lstsq(values.T, new.T).solution.T
        delta = problem.o.weight[:, cut] - whole(solution, "o").weight[:, kept] @ down
        total += float((root @ delta @ root_of(problem.output.second[cut, cut])).square().sum())
    return total


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

    @pytest.mark.parametrize("metric", ["attention", "loss"])
    @pytest.mark.parametrize("kv_heads", [4, 2])
    def test_rotary_pairs_are_the_cheapest_set_of_all(self, make_case, kv_heads, metric):
        """Of three pairs a head, against every set that could stay, measured on the tokens."""
        case = make_case("qk", kv_heads=kv_heads, rotary="half", bias=True)
        solution = solve_qk(case.problem, 4, metric=metric)
        best = case.measured(solution)
        assert solution.rotary_columns is not None
        for head, pair in itertools.product(range(kv_heads), range(3)):
            columns = solution.rotary_columns.clone()
            left = [j for j in range(3) if j != pair]
            columns[head] = torch.tensor([*left, *(j + 3 for j in left)])
            other = kept_columns(case.problem, columns, solution)
            assert case.measured(other) >= best * (1 - 1e-9)

    @pytest.mark.parametrize("rank", [1, 3, 5])
    def test_the_loss_takes_the_optimum_of_queries_and_what_they_pull(self, make_case, rank):
        """½ E(qᵀΔγ)² for independent q and γ: the spectrum of S_q^½ S_γ^½."""
        problem = make_case("qk", kv_heads=4, bias=True).problem
        q = per_head(problem.q, problem.input, 4)
        spectra = [
            torch.linalg.svdvals(root_of(a) @ root_of(b)) for a, b in zip(q, problem.gradient, strict=True)
        ]
        expected = sum(float(s[rank:].square().sum()) for s in spectra) / 2
        predicted = solve_qk(problem, rank, metric="loss").predicted
        assert predicted.loss == predicted.error == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("metric", ["attention", "score"])
    def test_other_metrics_predict_the_loss_of_the_pairs_that_go(self, make_case, metric):
        problem = make_case("qk", kv_heads=2, rotary="half").problem
        solution = solve_qk(problem, 2, metric=metric)
        assert solution.rotary_columns is not None
        expected = 0.0
        for gram, kept in zip(problem.gradient.double(), solution.rotary_columns, strict=True):
            gone = [pair for pair in range(len(gram)) if pair not in kept.tolist()]
            expected += sum(float(gram[i, j]) for i in gone for j in gone) / 2
        assert solution.predicted.loss == pytest.approx(expected, rel=1e-9)

    def test_without_positions_the_loss_of_a_shared_key_counts_each_of_its_queries(self, make_case):
        problem = make_case("qk", kv_heads=2, bias=True).problem
        predicted = solve_qk(problem, 3, metric="loss").predicted
        assert predicted.loss == pytest.approx(predicted.error, rel=1e-9)
        assert predicted.error > 0

    def test_the_loss_counts_what_changes_of_the_loss_do(self):
        """A loss linear in the scores: its change is that of the scores times their gradients."""
        generator = torch.Generator().manual_seed(1)
        weight, slopes = (
            torch.randn(6, 6, generator=generator).double(),
            torch.randn(9, 9, generator=generator),
        )
        x = torch.randn(9, 6, generator=generator).double()
        slopes = (slopes - slopes.mean(dim=1, keepdim=True)).double()
        q, k = x @ weight.T, x
        q.requires_grad_()
        (slopes * (q @ k.T)).sum().backward()
        pulls = q.grad
        assert pulls is not None
        problem = QKProblem(
            Affine(weight),
            Affine(torch.eye(6).double()),
            Heads(1, 1, 6),
            Moment(x.T @ x / 9, x.mean(dim=0), 9),
            gradient=(pulls.T @ pulls / 9).unsqueeze(0),
        )
        solution = solve_qk(problem, 4, metric="loss")
        new = (x @ whole(solution, "q").weight.T) @ (x @ whole(solution, "k").weight.T).T
        change = new - q.detach() @ k.T  # every query with every key
        each = torch.einsum("mn,ln->ml", change, slopes)  # every query with every set of slopes
        assert solution.predicted.loss == pytest.approx(float(each.square().mean()) / 2, rel=1e-9)

    def test_attention_als_is_for_positions_that_do_not_turn(self):
        refuses = solve_qk.solver.refuses  # type: ignore[attr-defined]
        message = refuses(Heads(4, 2, 6, "half"), {"metric": "attention_als"})
        assert "attention_als" in message
        assert "nearest is attention" in message
        assert refuses(Heads(4, 2, 6), {"metric": "attention_als"}) is None
        assert refuses(Heads(4, 2, 6, "half"), {"metric": "attention"}) is None

    @pytest.mark.parametrize("kv_heads", [4, 2])
    def test_each_metric_of_attention_is_better_than_the_one_before(self, make_case, kv_heads):
        """In the divergence that all three are after, query by query: score, attention, attention_als."""
        totals = dict.fromkeys(("score", "attention", "attention_als"), 0.0)
        for seed, metric in itertools.product(range(6), totals):
            case = make_case("qk", seed=seed, kv_heads=kv_heads, bias=True)
            solution = solve_qk(case.problem, 3, metric=metric)
            # told to be measured by the attention of every query
            exact = replace(solution.predicted, metric="kl"), {"rounds": 0}
            measured = case.measured(replace(solution, predicted=exact[0], numerics=exact[1]))
            totals[metric] += measured / solve_qk(case.problem, 3, metric="attention_als").predicted.reference
        assert totals["attention_als"] < 0.97 * totals["attention"]
        assert totals["attention"] < 0.97 * totals["score"]


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
        solution = solve_ov(problem, 2, metric="output", subspace="stacked", refit="none")
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
        values, group = (
            whole(solve_ov(problem, 2, metric="output", subspace="stacked"), "v").weight,
            4 // kv_heads,
        )
        for head in range(kv_heads):
            cuts = [slice(6 * h, 6 * h + 6) for h in range(head * group, (head + 1) * group)]
            root = root_of(torch.stack([problem.output.second[cut, cut] for cut in cuts]).mean(dim=0))
            vt = torch.linalg.svd(torch.cat([problem.o.weight[:, cut] @ root for cut in cuts]))[2][:2]
            expected = vt @ torch.linalg.inv(root) @ problem.v.weight[6 * head : 6 * head + 6]
            bases = [torch.linalg.qr(m.T)[0] for m in (expected, values[2 * head : 2 * head + 2])]
            overlap = torch.linalg.svdvals(bases[0].T @ bases[1])
            torch.testing.assert_close(overlap, torch.ones(2).double(), rtol=0, atol=1e-6)

    def test_the_loss_gives_every_head_its_own_optimum_in_the_metric_of_gradients(self, make_case):
        """One query head a value head: G^½ O_h S_h^½ cut to its first singular values."""
        problem = make_case("ov", kv_heads=4).problem
        solution = solve_ov(problem, 2, metric="loss", refit="none")
        root, expected = root_of(problem.gradient), []
        output, values = (whole(solution, r).weight for r in ("o", "v"))
        for head in range(4):
            cut, kept = slice(6 * head, 6 * head + 6), slice(2 * head, 2 * head + 2)
            own = root_of(problem.output.second[cut, cut])
            u, s, vt = torch.linalg.svd(root @ problem.o.weight[:, cut] @ own, full_matrices=False)
            expected = torch.linalg.inv(root) @ (u[:, :2] * s[:2]) @ vt[:2] @ torch.linalg.inv(own)
            product = expected @ problem.v.weight[cut]
            torch.testing.assert_close(output[:, kept] @ values[kept], product, rtol=1e-3, atol=1e-3)

    def test_the_loss_costs_less_loss_and_the_output_less_output(self, make_case):
        found = {metric: [0.0, 0.0] for metric in ("output", "loss")}
        for seed, kv_heads in itertools.product(range(4), (4, 2)):
            problem = make_case("ov", seed=seed, kv_heads=kv_heads).problem
            # gradients that mostly look one way, as those of a model do
            gradient = torch.diag(torch.logspace(0, -3, 10).double())
            for metric, sums in found.items():
                predicted = solve_ov(replace(problem, gradient=gradient), 2, metric=metric).predicted
                assert predicted.loss is not None
                sums[0] += predicted.error / predicted.reference
                sums[1] += predicted.loss
        assert found["output"][0] < found["loss"][0]
        assert found["loss"][1] < 0.9 * found["output"][1]

    def test_without_gradients_no_loss_is_predicted(self, make_case):
        problem = replace(make_case("ov", kv_heads=2).problem, gradient=None)
        assert solve_ov(problem, 2, metric="output").predicted.loss is None

    @pytest.mark.parametrize("metric", ["output", "loss"])
    @pytest.mark.parametrize("kv_heads", [2, 1])
    def test_each_subspace_is_better_than_the_one_before(self, make_case, kv_heads, metric):
        """By itself each head loses less with als, all together least with joint."""
        alone, joint = {"stacked": 0.0, "als": 0.0}, {"stacked": 0.0, "als": 0.0, "joint": 0.0}
        for seed in range(6):
            problem = make_case("ov", seed=seed, kv_heads=kv_heads).problem
            root = root_of(problem.gradient) if metric == "loss" else torch.eye(10).double()
            final = {}
            for subspace in joint:
                solution = solve_ov(problem, 3, metric=metric, subspace=subspace)
                predicted = solution.predicted
                assert predicted.loss is not None
                final[subspace] = 2 * predicted.loss if metric == "loss" else predicted.error
                joint[subspace] += final[subspace]
                assert subspace == "stacked" or solution.numerics["rounds"] > 0
            assert final["joint"] <= final["als"] * (1 + 1e-4)
            assert final["joint"] <= final["stacked"] * (1 + 1e-4)
            each = {}
            for subspace in alone:
                solution = solve_ov(problem, 3, metric=metric, subspace=subspace, refit="none")
                each[subspace] = own_errors(problem, solution, root, kv_heads)
                alone[subspace] += each[subspace]
            assert each["als"] <= each["stacked"] * (1 + 1e-4)
        assert alone["als"] < 0.99 * alone["stacked"]
        assert joint["joint"] < 0.97 * joint["als"]
        assert joint["joint"] < 0.97 * joint["stacked"]

    def test_a_joint_subspace_needs_the_refit(self):
        refuses = solve_ov.solver.refuses  # type: ignore[attr-defined]
        assert "nearest is als" in refuses(Heads(4, 2, 6), {"subspace": "joint", "refit": "none"})
        assert refuses(Heads(4, 2, 6), {"subspace": "als", "refit": "none"}) is None


def kept_neurons(problem: MLPProblem, solution: Solution) -> list[int]:
    """Return the neurons whose input weights a solution keeps."""
    role = next(iter(problem.inputs))
    rows = problem.inputs[role].weight
    return [int((rows == row).all(dim=1).nonzero().item()) for row in whole(solution, role).weight]


class TestMLP:
    def test_keeps_the_largest_scores_of_the_published_rule(self, make_case):
        for facts in ({"gated": True}, {"gated": False, "bias": True}):
            problem = make_case("mlp", **facts).problem
            moment = problem.hidden.second if "bias" not in facts else problem.hidden.centred
            score = moment.diagonal().sqrt() * problem.output.weight.square().sum(dim=0).sqrt()
            expected = sorted(sorted(range(16), key=lambda i: -float(score[i]))[:5])
            solution = solve_mlp(problem, 5, metric="output", select="score")
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
        kept = kept_neurons(case.problem, solution)
        assert torch.equal(whole(published, role).weight, case.problem.output.weight[:, kept])

    @pytest.mark.parametrize("facts", [{"gated": True}, {"gated": False, "bias": True}])
    @pytest.mark.parametrize("metric", ["output", "loss"])
    def test_obs_is_elimination_one_by_one_with_a_fit_each_time(self, make_case, facts, metric):
        """Against fitting, for every neuron that could go next, all that is left."""
        problem = make_case("mlp", **facts).problem
        weight, c = (
            problem.output.weight,
            problem.hidden.second if "bias" not in facts else problem.hidden.centred,
        )
        c = c + 1e-6 * c.diagonal().mean() * torch.eye(16).double()
        g = problem.gradient if metric == "loss" else torch.eye(10).double()

        def loss(kept: list[int]) -> float:
            delta = weight.clone()
            delta[:, kept] -= weight @ c[:, kept] @ torch.linalg.inv(c[kept][:, kept])
            return float(torch.trace(g @ delta @ c @ delta.T)) / 2

        kept = list(range(16))
        while len(kept) > 5:
            kept = min(([i for i in kept if i != gone] for gone in kept), key=loss)
        solution = solve_mlp(problem, 5, metric=metric, select="obs")
        assert kept_neurons(problem, solution) == kept
        assert solution.numerics["elimination_damping"] == 1e-6
        if metric == "loss":
            assert solution.predicted.loss == pytest.approx(loss(kept), rel=1e-3)

    def test_scores_in_the_loss_weigh_columns_by_the_gradients(self, make_case):
        problem = make_case("mlp", gated=True).problem
        score = [
            float(problem.hidden.second[i, i] * w @ problem.gradient @ w)
            for i, w in enumerate(problem.output.weight.T)
        ]
        expected = sorted(sorted(range(16), key=lambda i: -score[i])[:5])
        solution = solve_mlp(problem, 5, metric="loss", select="score")
        assert kept_neurons(problem, solution) == expected
