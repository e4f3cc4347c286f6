from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrc.errors import UserError
from lrc.maths.linalg import (
    DAMPING,
    balanced,
    best_pair,
    best_projector,
    damped,
    damped_cholesky,
    data_error,
    data_errors,
    direction_scores,
    eliminate,
    eliminate_columns,
    gram_root,
    product_singular_values,
    regress,
    regress_kept,
    singular_values,
    symmetric_root,
)

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
sizes = st.integers(1, 12)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(size: int, seed: int, spread: float = 1.0) -> Tensor:
    """A positive definite matrix whose eigenvalues span ``spread`` powers of ten."""
    q, _ = torch.linalg.qr(normal(size, size, seed=seed))
    return q @ torch.diag(torch.logspace(0, -spread, size, dtype=torch.float64)) @ q.T


def root_of(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def metric(delta: Tensor, c: Tensor, g: Tensor | None = None) -> float:
    left = delta if g is None else root_of(g) @ delta
    return float((left @ root_of(c)).square().sum())


def tail(matrix: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())


class TestBestPair:
    @settings(max_examples=40, deadline=None)
    @given(rows=sizes, columns=sizes, data=st.data())
    def test_without_moments_leaves_the_tail_of_the_spectrum(self, rows, columns, data):
        rank = data.draw(st.integers(1, min(rows, columns)))
        w = normal(rows, columns, seed=rows * 100 + columns)
        b, a, damping = best_pair(w, rank)
        assert (b.shape, a.shape, damping) == ((rows, rank), (rank, columns), 0.0)
        assert float((w - b @ a).square().sum()) == pytest.approx(tail(w, rank), rel=1e-9, abs=1e-20)

    @settings(max_examples=40, deadline=None)
    @given(rows=sizes, columns=sizes, with_c=st.booleans(), with_g=st.booleans(), data=st.data())
    def test_reaches_the_bound_of_the_whitened_matrix(self, rows, columns, with_c, with_g, data):
        rank = data.draw(st.integers(1, min(rows, columns)))
        w = normal(rows, columns, seed=rows * 100 + columns)
        c = moment_of(columns, seed=1) if with_c else None
        g = moment_of(rows, seed=2) if with_g else None
        b, a, _ = best_pair(w, rank, c, g)
        eye_c, eye_g = torch.eye(columns).double(), torch.eye(rows).double()
        white = root_of(eye_g if g is None else g) @ w @ root_of(eye_c if c is None else c)
        reached = metric(w - b @ a, eye_c if c is None else c, eye_g if g is None else g)
        # the solution is optimal for the damped metric
        slack = 4 * DAMPING * float(white.square().sum())
        assert tail(white, rank) * (1 - 1e-9) <= reached + 1e-15
        assert reached <= tail(white, rank) + slack

    @pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
    @pytest.mark.parametrize("given_", ["none", "c", "g", "both"])
    def test_at_full_rank_gives_the_matrix_back(self, shape, given_):
        w = normal(*shape, seed=3)
        c = moment_of(shape[1], seed=4, spread=8) if given_ in ("c", "both") else None
        g = moment_of(shape[0], seed=5, spread=8) if given_ in ("g", "both") else None
        b, a, _ = best_pair(w, min(shape), c, g)
        torch.testing.assert_close(b @ a, w, rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
    def test_identity_moments_are_truncated_svd(self, shape):
        w = normal(*shape, seed=6)
        b, a, _ = best_pair(w, 3, torch.eye(shape[1]), torch.eye(shape[0]))
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        torch.testing.assert_close(b @ a, u[:, :3] @ torch.diag(s[:3]) @ vt[:3], **CLOSE)

    @pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
    @pytest.mark.parametrize("kind", ["rank-deficient", "ill-conditioned", "one-dimension", "zero"])
    def test_hard_moments_are_finite_and_never_lose_to_plain_svd(self, shape, kind):
        w, n = normal(*shape, seed=7), shape[1]
        x = {
            "rank-deficient": normal(n // 2, n, seed=8),
            "ill-conditioned": normal(200, n, seed=9) * torch.logspace(-5, 3, n, dtype=torch.float64),
            "one-dimension": normal(200, n, seed=10) * torch.eye(n).double()[2],
            "zero": torch.zeros(5, n).double(),
        }[kind]
        c = x.T @ x / len(x)
        for rank in (1, 4, 9):
            b, a, damping = best_pair(w, rank, c.float())
            plain_b, plain_a, _ = best_pair(w, rank)
            assert b.isfinite().all()
            assert a.isfinite().all()
            assert damping >= DAMPING
            plain = w - plain_b @ plain_a
            # The optimum for C + εI can only lose what εI adds to plain SVD's error.
            slack = damping * float(c.diagonal().mean() * plain.square().sum())
            assert data_error(w - b @ a, c) <= data_error(plain, c) + slack

    @pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
    def test_directions_that_no_gradient_reads_are_spent_on_the_data(self, shape):
        w, c = normal(*shape, seed=11), moment_of(shape[1], seed=12, spread=3)
        g = torch.zeros(shape[0], shape[0]).double()
        g[:2, :2] = torch.eye(2)
        b, a, _ = best_pair(w, 8, c, g)
        delta = w - b @ a
        assert metric(delta, c, g) < 1e-4 * metric(w, c, g)
        random = torch.linalg.qr(normal(shape[1], 8, seed=13))[0]
        assert data_error(delta, c) < 0.7 * data_error(w - w @ random @ random.T, c)

    def test_reports_the_damping_of_both_sides(self):
        for rows, columns in [(6, 8), (8, 6)]:
            w = normal(rows, columns, seed=14)
            c, g = torch.eye(columns).double(), torch.eye(rows).double()
            assert best_pair(w, 2, c)[2] == DAMPING
            assert best_pair(w, 2, None, g)[2] == DAMPING
            c[0, 0] = -2e-5
            assert best_pair(w, 2, c, g)[2] == pytest.approx(1e-4)
            g[0, 0] = -2e-4
            assert best_pair(w, 2, c, g)[2] == pytest.approx(1e-3)

    def test_factors_are_balanced(self):
        w, c = normal(12, 9, seed=16), moment_of(9, seed=17, spread=6)
        b, a, _ = best_pair(1e3 * w, 4, c)
        torch.testing.assert_close(b.T @ b, a @ a.T, rtol=1e-7, atol=1e-7)

    def test_batches_share_or_bring_their_moments(self):
        w = normal(3, 6, 9, seed=18)
        c = torch.stack([moment_of(9, seed=19 + i) for i in range(3)])
        for stacked in (w, w.mT.contiguous()):
            n = stacked.shape[-1]
            own, shared = c[:, :n, :n], c[0, :n, :n]
            b, a, _ = best_pair(stacked, 2, own)
            b1, a1, _ = best_pair(stacked, 2, shared)
            for i in range(3):
                alone = best_pair(stacked[i], 2, own[i])
                torch.testing.assert_close(b[i] @ a[i], alone[0] @ alone[1], **CLOSE)
                alone = best_pair(stacked[i], 2, shared)
                torch.testing.assert_close(b1[i] @ a1[i], alone[0] @ alone[1], **CLOSE)

    def test_same_input_same_bits_and_inputs_untouched(self):
        w, c, g = normal(7, 9, seed=22), moment_of(9, seed=23), moment_of(7, seed=24)
        before = w.clone(), c.clone(), g.clone()
        first, second = best_pair(w, 3, c, g), best_pair(w, 3, c, g)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        assert all(torch.equal(x, y) for x, y in zip((w, c, g), before, strict=True))


class TestBestProjector:
    @settings(max_examples=30, deadline=None)
    @given(size=st.integers(1, 10), data=st.data())
    def test_leaves_the_tail_of_the_product_of_the_roots(self, size, data):
        """Scores of independent q and k: the optimum of A3 is the spectrum of S_q^½ S_k^½."""
        rank = data.draw(st.integers(1, size))
        c, h = moment_of(size, seed=1, spread=2), moment_of(size, seed=2, spread=2)
        p = best_projector(c, h, rank)
        delta = torch.eye(size).double() - p.up @ p.down
        reached = float(torch.trace(h @ delta @ c @ delta.T))
        product = root_of(h) @ root_of(c)
        best = tail(product, rank)
        assert reached == pytest.approx(best, rel=1e-6, abs=4 * DAMPING * float(product.square().sum()))

    @pytest.mark.parametrize("rank", [1, 2, 4])
    def test_no_descent_improves_on_it(self, rank):
        c, h = moment_of(5, seed=3, spread=2), moment_of(5, seed=4, spread=2)
        p = best_projector(c, h, rank)

        def error(up: Tensor, down: Tensor) -> Tensor:
            delta = torch.eye(5).double() - up @ down
            return torch.trace(h @ delta @ c @ delta.T)

        found = float(error(p.up, p.down))
        best = torch.inf
        for seed in range(3):
            factors = [normal(5, rank, seed=seed), normal(rank, 5, seed=seed + 9)]
            for x in factors:
                x.requires_grad_()
            optimizer = torch.optim.LBFGS(factors, max_iter=300, line_search_fn="strong_wolfe")

            def closure(optimizer=optimizer, factors=factors) -> Tensor:
                optimizer.zero_grad()
                loss = error(*factors)
                loss.backward()
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]
            best = min(best, error(*factors).item())
        assert found == pytest.approx(best, rel=1e-3)
        assert found <= best * (1 + 1e-5)

    def test_is_a_projector_and_the_identity_at_full_rank(self):
        c, h = moment_of(6, seed=5, spread=7), moment_of(6, seed=6, spread=7)
        for rank in (2, 6):
            p = best_projector(c, h, rank)
            torch.testing.assert_close(p.down @ p.up, torch.eye(rank).double(), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(p.up @ p.down, torch.eye(6).double(), rtol=1e-7, atol=1e-7)

    def test_without_a_moment_takes_the_top_eigenvectors(self):
        h = moment_of(6, seed=7)
        p = best_projector(None, h, 2)
        values, vectors = torch.linalg.eigh(h)
        torch.testing.assert_close(p.up @ p.down, vectors[:, -2:] @ vectors[:, -2:].T, **CLOSE)
        torch.testing.assert_close(p.up.T @ h @ p.up, torch.diag(values[-2:].flip(0)), **CLOSE)


class TestBalanced:
    @settings(max_examples=20, deadline=None)
    @given(rows=sizes, columns=sizes, data=st.data())
    def test_keeps_the_product_and_evens_the_factors(self, rows, columns, data):
        rank = data.draw(st.integers(1, min(rows, columns)))
        b, a = 1e4 * normal(rows, rank, seed=1), 1e-4 * normal(rank, columns, seed=2)
        even_b, even_a = balanced(b, a)
        torch.testing.assert_close(even_b @ even_a, b @ a, **CLOSE)
        torch.testing.assert_close(even_b.T @ even_b, even_a @ even_a.T, **CLOSE)
        gram = even_b.T @ even_b
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), **CLOSE)


class TestCholesky:
    def test_solves_from_the_right(self):
        c, right = moment_of(5, seed=1), normal(3, 5, seed=2)
        root = damped_cholesky(c, 0.1)
        expected = right @ torch.linalg.inv(c + 0.1 * c.diagonal().mean() * torch.eye(5).double())
        torch.testing.assert_close(root.solve(right), expected, **CLOSE)
        torch.testing.assert_close(root.factor @ root.factor.T, root.matrix, **CLOSE)
        assert root.damping == 0.1

    @pytest.mark.parametrize(
        ("lowest", "damping"), [(0.0, 1e-6), (-5e-6, 1e-5), (-5e-4, 1e-3), (-5e-3, 1e-2)]
    )
    def test_raises_and_reports_damping_until_the_factor_exists(self, lowest, damping):
        c = torch.diag(torch.tensor([2.0, 1.0, 1.0, lowest])).double()
        root = damped_cholesky(c)
        assert root.damping == pytest.approx(damping)
        torch.testing.assert_close(root.matrix, damped(c, root.damping), rtol=0, atol=0)

    def test_one_bad_matrix_raises_the_damping_of_its_batch(self):
        good, bad = torch.eye(3).double(), torch.diag(torch.tensor([1.0, 1.0, -1e-4])).double()
        assert damped_cholesky(torch.stack([good, bad])).damping == pytest.approx(1e-3)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
    def test_what_is_no_moment_is_the_users_to_know(self, value):
        c = torch.eye(3).double()
        c[1, 1] = value
        with pytest.raises(UserError, match="moment"):
            damped_cholesky(c)

    def test_damping_is_relative_and_leaves_its_input(self):
        c = 1e-20 * moment_of(4, seed=3)
        before = c.clone()
        expected = c + 0.5 * c.diagonal().mean() * torch.eye(4).double()
        torch.testing.assert_close(damped(c, 0.5), expected, rtol=1e-14, atol=0)
        assert torch.equal(c, before)

    def test_a_dead_input_gets_a_scale_of_its_own(self):
        torch.testing.assert_close(damped(torch.zeros(2, 2), 0.5), 0.5 * torch.eye(2).double())


class TestRegression:
    def setup_method(self):
        self.x = normal(400, 8, seed=1) @ normal(8, 8, seed=2)
        self.c = self.x.T @ self.x / len(self.x)
        self.w = normal(5, 8, seed=3)

    def test_regress_is_least_squares_on_the_tokens(self):
        reader = normal(3, 8, seed=4)
        fitted, damping = regress(self.w, self.c, reader)
        expected = torch.linalg.lstsq(self.x @ reader.T, self.x @ self.w.T).solution.T
        torch.testing.assert_close(fitted, expected, rtol=1e-4, atol=1e-4)
        delta = self.w - fitted @ reader
        assert data_error(delta, self.c) == pytest.approx(
            data_error(self.w - expected @ reader, self.c), rel=1e-6
        )
        assert damping == DAMPING

    def test_regress_inverts_an_invertible_reader_even_for_a_singular_moment(self):
        reader = normal(8, 8, seed=5)
        x = self.x[:3]
        fitted, _ = regress(self.w, x.T @ x / 3, reader)
        torch.testing.assert_close(fitted, self.w @ torch.linalg.inv(reader), rtol=1e-6, atol=1e-6)

    def test_regress_kept_is_least_squares_on_the_kept_columns(self):
        kept = torch.tensor([1, 2, 6])
        fitted, _ = regress_kept(self.w, self.c, kept)
        expected = torch.linalg.lstsq(self.x[:, kept], self.x @ self.w.T).solution.T
        torch.testing.assert_close(fitted, expected, rtol=1e-4, atol=1e-4)
        same, _ = regress(self.w, self.c, torch.eye(8).double()[kept])
        torch.testing.assert_close(fitted, same, **CLOSE)

    def test_regress_kept_gives_all_columns_back(self):
        x = self.x[:3]
        fitted, _ = regress_kept(self.w, x.T @ x / 3, torch.arange(8))
        torch.testing.assert_close(fitted, self.w, rtol=1e-9, atol=1e-9)

    def test_moments_are_left_as_they_were(self):
        before = self.c.clone()
        regress(self.w, self.c, normal(3, 8, seed=4))
        regress_kept(self.w, self.c, torch.tensor([0, 3]))
        assert torch.equal(self.c, before)


class TestElimination:
    def test_columns_go_one_by_one_as_the_refit_makes_up_for_them(self):
        """Against refitting after every removal that could come next."""
        x = normal(300, 9, seed=1) @ normal(9, 9, seed=2)
        c, w = x.T @ x / 300, normal(5, 9, seed=3)

        def error(kept: list[int]) -> float:
            index = torch.tensor(kept)
            fitted, _ = regress_kept(w, c, index)
            delta = w.clone()
            delta[:, index] -= fitted
            return data_error(delta, c)

        kept = list(range(9))
        for size in range(8, 2, -1):
            kept = min(([i for i in kept if i != gone] for gone in kept), key=error)
            assert eliminate_columns(w, c, size, block=1)[0].tolist() == kept
        assert error(eliminate_columns(w, c, 4, block=1)[0].tolist()) <= error(
            eliminate_columns(w, c, 4)[0].tolist()
        )

    def test_blocks_choose_nearly_as_one_by_one(self):
        """What is left out costs within a hundredth of the exact choice, twins among the columns included."""
        x = normal(600, 160, seed=1) @ normal(160, 192, seed=2) / 10 + 0.5 * normal(600, 192, seed=3)
        x[:, 32:64] = x[:, :32] + 0.01 * normal(600, 32, seed=4)
        c, w = x.T @ x / 600, normal(24, 192, seed=5)

        def error(kept: Tensor) -> float:
            delta = w.clone()
            delta[:, kept] -= regress_kept(w, c, kept)[0]
            return data_error(delta, c)

        for keep in (160, 115, 77):
            exact = error(eliminate_columns(w, c, keep, block=1)[0])
            assert error(eliminate_columns(w, c, keep)[0]) <= 1.01 * exact
            assert error(eliminate_columns(w, c, keep, block=8)[0]) <= 1.05 * exact

    def test_elimination_tells_what_damping_it_took(self):
        """A moment that is indefinite by rounding takes more than was asked for."""
        w, c = normal(4, 6, seed=5), moment_of(6, seed=6)
        assert eliminate_columns(w, c, 3)[1] == DAMPING
        values, vectors = torch.linalg.eigh(c)
        values[0] = -5e-4 * values[1:].sum() / 6
        assert eliminate_columns(w, vectors @ values.diag() @ vectors.T, 3)[1] == pytest.approx(1e-3)

    def test_a_set_of_indices_is_never_worse_than_one_by_one_and_mostly_the_best(self):
        """Members may cancel: the cost of a set is the sum of its whole block. Against all sets of eight."""
        root = normal(40, 8, 8, seed=4)
        gram, best, found, plain = root @ root.mT, 0, 0, 0

        def cost(matrix: Tensor, gone: Any) -> float:
            return float(matrix[list(gone)][:, list(gone)].sum())

        for keep in range(1, 8):
            kept = eliminate(gram, keep)
            assert kept.tolist() == [sorted(row) for row in kept.tolist()]
            assert eliminate(gram[0], keep).tolist() == kept[0].tolist()
            for matrix, left in zip(gram, kept.tolist(), strict=True):
                gone: list[int] = []
                for _ in range(8 - keep):
                    rest = [j for j in range(8) if j not in gone]
                    gone.append(min(rest, key=lambda j: cost(matrix, [*gone, j])))
                reached = cost(matrix, set(range(8)) - set(left))
                assert reached <= cost(matrix, gone) * (1 + 1e-9)
                least = min(cost(matrix, some) for some in combinations(range(8), 8 - keep))
                best += 1
                found += reached <= least * (1 + 1e-9)
                plain += cost(matrix, gone) <= least * (1 + 1e-9)
        assert found > plain
        assert found > 0.9 * best

    def test_inputs_are_left_as_they_were(self):
        w, c = normal(4, 6, seed=5), moment_of(6, seed=6)
        before = w.clone(), c.clone()
        assert eliminate_columns(w, c, 6)[0].tolist() == list(range(6))
        eliminate_columns(w, c, 3)
        eliminate(c, 3)
        assert torch.equal(w, before[0])
        assert torch.equal(c, before[1])


class TestDataError:
    def test_is_the_mean_squared_change_on_the_tokens(self):
        x, delta = normal(50, 6, seed=1), normal(4, 6, seed=2)
        expected = float((x @ delta.T).square().sum(dim=1).mean())
        assert data_error(delta, x.T @ x / 50) == pytest.approx(expected, rel=1e-12)

    def test_in_the_metric_of_gradients_is_their_mean_squared_product_with_the_changes(self):
        x, delta, gradients = normal(50, 6, seed=1), normal(4, 6, seed=2), normal(30, 4, seed=3)
        expected = float((gradients @ delta @ x.T).square().sum() / (30 * 50))
        g = gradients.T @ gradients / 30
        assert data_errors(delta, x.T @ x / 50, None, g)[1] == pytest.approx(expected, rel=1e-12)
        root, damping = gram_root(g)
        assert damping == DAMPING
        assert data_error(root @ delta, x.T @ x / 50) == pytest.approx(expected, rel=1e-4)

    def test_an_indefinite_sum_gives_no_negative_square(self):
        assert data_error(torch.eye(2), torch.diag(torch.tensor([1e-9, -2e-9]))) == 0.0


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_direction_scores_are_what_dropping_each_alone_costs(shape: tuple[int, int]) -> None:
    w, (m, n) = normal(*shape, seed=1), shape
    c, g = moment_of(n, 2, spread=2.0), moment_of(m, 3)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    drops = [s[i] * torch.outer(u[:, i], vh[i]) for i in reversed(range(min(shape)))]  # ascending
    expected = torch.tensor([float(torch.trace(g @ d @ c @ d.T)) for d in drops], dtype=torch.float64)
    torch.testing.assert_close(direction_scores(w, c, g), expected, **CLOSE)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_singular_values_are_those_of_the_matrix_in_the_metric(shape: tuple[int, int]) -> None:
    w, c = normal(3, *shape, seed=1), moment_of(shape[1], seed=2, spread=2)
    torch.testing.assert_close(singular_values(w), torch.linalg.svdvals(w), **CLOSE)
    expected = torch.linalg.svdvals(w @ root_of(damped(c)))
    torch.testing.assert_close(singular_values(w, c.expand(3, -1, -1)), expected, **CLOSE)
    singular = torch.zeros_like(c)
    assert bool((singular_values(w[0], singular) < 1e-2).all())


def test_singular_values_of_products_come_from_small_grams() -> None:
    a, b = normal(2, 9, 3, seed=1), normal(2, 3, 7, seed=2)
    found = product_singular_values(a.mT @ a, b @ b.mT)
    torch.testing.assert_close(found, torch.linalg.svdvals(a @ b)[:, :3], **CLOSE)


def test_a_symmetric_root_takes_what_is_below_zero_as_zero() -> None:
    c = moment_of(5, seed=3)
    torch.testing.assert_close(symmetric_root(c) @ symmetric_root(c), c, **CLOSE)
    indefinite = torch.diag(torch.tensor([4.0, -1e-9]))
    torch.testing.assert_close(
        symmetric_root(indefinite), torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))
    )
