"""Fit subspaces that have no closed form by alternating least squares, in float64.

A head is approximated by U T, with T (r, D) and U (D, r). Each problem is quadratic in U for a fixed T, and in T for a
fixed U. The error never grows; rounds end when it hardly falls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lrc.maths.linalg import damped, damped_cholesky

ROUNDS, STEPS, GROWTH = 30, 8, 1.5
FALL, PATIENCE = 1e-3, 3  # rounds end when the error falls by less than FALL, PATIENCE times in a row

Linear = Callable[[Tensor], Tensor]


class Maps(NamedTuple):
    """Hold U (``up``), one for each reader, T (``down``), which readers share, and the largest damping of a solve.

    ``damping`` is relative to the mean diagonal; 0 if no matrix was singular.
    """

    up: Tensor
    down: Tensor
    damping: float = 0.0


def shared_rows(moments: Tensor, grams: Tensor, start: Tensor) -> tuple[Maps, int]:
    """Minimise Σ_h tr(H_h (I − U_h T) S_h (I − U_h T)ᵀ) for each group of heads; return the maps and the rounds.

    Shapes: S_h and H_h (groups, heads, D, D), ``start`` for T (groups, r, D), U_h (groups, heads, D, r).
    """
    moments, grams = damped(moments), grams.double()
    mean = moments.mean(dim=1)
    eye = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)

    def fitted(down: Tensor) -> Maps:
        down = _orthonormal(down, mean)
        through = moments @ down.mT.unsqueeze(1)
        root = damped_cholesky(down.unsqueeze(1) @ through, damping=0.0)
        return Maps(root.solve(through), down, root.damping)

    def advance(maps: Maps, stretch: float) -> Maps:
        up = maps.up
        left = up.mT @ grams @ up
        right = (up.mT @ grams @ moments).sum(dim=1)
        kronecker = _kronecker_inverse(left.sum(dim=1), mean)
        best = _descend(lambda t: (left @ t.unsqueeze(1) @ moments).sum(dim=1), right, maps.down, kronecker)
        return fitted(torch.lerp(maps.down, best, stretch))

    def error(maps: Maps) -> Tensor:
        delta = eye - maps.up @ maps.down.unsqueeze(1)
        return (grams @ delta @ moments * delta).sum()

    return _rounds(fitted(start.double()), advance, error)


def joint_rows(weight: Tensor, c: Tensor, *starts: Tensor) -> tuple[Maps, int]:
    """Minimise tr((W − W' T̄) C (W − W' T̄)ᵀ) over W' and T (groups, r, D); return the maps and the rounds.

    Starts from the best of ``starts``. T̄ is block-diagonal and repeats T for every head of its group. Shapes:
    W (m, heads·D), C (heads·D, heads·D), W' (m, heads·r). For a metric G = RᵀR pass R W; the result is then R W'.
    """
    groups, rank, dim = starts[0].shape
    weight, c = weight.double(), damped(c)
    heads = c.shape[0] // dim
    blocks = c.unflatten(1, (heads, dim)).transpose(0, 1)  # (heads, heads·D, D): columns of C by head
    mean = torch.stack([blocks[h, h * dim : (h + 1) * dim] for h in range(heads)])
    mean = mean.unflatten(0, (groups, -1)).mean(dim=1)
    read = (weight @ c).unflatten(1, (heads, dim)).transpose(0, 1)  # (heads, m, D)
    size = (weight @ c * weight).sum()

    def spread(down: Tensor) -> Tensor:
        return down.repeat_interleave(heads // groups, dim=0)

    def joined(down: Tensor) -> Tensor:
        return down.unflatten(0, (groups, -1)).sum(dim=1)

    def fitted(down: Tensor) -> Maps:
        down = _orthonormal(down, mean)
        every = spread(down)
        through = (blocks @ every.mT).transpose(0, 1).flatten(1)  # C T̄ᵀ
        inner = (every @ through.unflatten(0, (heads, dim))).flatten(0, 1)
        root = damped_cholesky(inner, damping=0.0)
        return Maps(root.solve((read @ every.mT).transpose(0, 1).flatten(1)), down, root.damping)

    def advance(maps: Maps, stretch: float) -> Maps:
        output = maps.up.unflatten(1, (heads, rank)).transpose(0, 1)  # (heads, m, r)
        gram = (maps.up.mT @ output).contiguous()  # (heads, heads·r, r): columns of W'ᵀW' by head

        def apply(down: Tensor) -> Tensor:
            rows = (gram @ spread(down)).unflatten(1, (heads, rank))  # (from, to, r, D)
            return joined(rows.permute(1, 2, 0, 3).flatten(2) @ blocks)

        own = torch.stack([gram[h, h * rank : (h + 1) * rank] for h in range(heads)])
        kronecker = _kronecker_inverse(joined(own), mean)
        best = _descend(apply, joined(output.mT @ read), maps.down, kronecker, together=True)
        return fitted(torch.lerp(maps.down, best, stretch))

    def error(maps: Maps) -> Tensor:
        explained = (read @ spread(maps.down).mT).transpose(0, 1).flatten(1)
        return size - (maps.up * explained).sum()

    start = min((fitted(start.double()) for start in starts), key=lambda maps: float(error(maps)))
    return _rounds(start, advance, error)


def shared_table(table: Tensor, inner: Tensor, outer: Tensor, c: Tensor, start: Tensor) -> tuple[Maps, int]:
    """Minimise Σ_t p_t ‖δ_t‖² + q_t δ_t C δ_tᵀ over the rows δ_t of E − B A; return the maps and the rounds.

    Shapes: E ``table`` (V, d), p ``inner`` and q ``outer`` (V,), C (d, d), ``start`` for A (r, d), B (V, r). Given one
    factor, the other has a closed form in the basis that makes both Gram matrices of the given factor diagonal.
    """
    table, c = table.double(), c.double()
    p, q = inner.double().unsqueeze(-1), outer.double().unsqueeze(-1)
    seen = table @ c
    sizes, axes = torch.linalg.eigh(c)
    sizes = sizes.clamp_min(0.0)  # rounding

    def fitted(down: Tensor, damping: float = 0.0) -> Maps:
        turn, first, second, own = _diagonal(down @ down.mT, down @ c @ down.mT)
        down = turn.mT @ down
        right = p * (table @ down.mT) + q * (seen @ down.mT)
        return Maps(right / (p * first + q * second), down, max(damping, own))

    def advance(maps: Maps, stretch: float) -> Maps:
        up = maps.up
        turn, first, second, damping = _diagonal(up.mT @ (p * up), up.mT @ (q * up))
        turned = up @ turn
        right = ((p * turned).mT @ table + (q * turned).mT @ seen) @ axes
        best = turn @ (right / (first.unsqueeze(-1) + second.unsqueeze(-1) * sizes)) @ axes.mT
        return fitted(torch.lerp(maps.down, best, stretch), damping)

    def error(maps: Maps) -> Tensor:
        delta = table - maps.up @ maps.down
        return (p * delta.square()).sum() + (q * (delta @ c) * delta).sum()

    return _rounds(fitted(start.double()), advance, error)


def attended_maps(q: Tensor, covariance: Tensor, start: Maps) -> tuple[Maps, int]:
    """Minimise Σ q_mᵀ (I − U_h T) Cov_m (I − U_h T)ᵀ q_m over queries m of the heads h that share a key head.

    Shapes: q (heads, queries, D), Cov (heads, queries, D, D), U (heads, D, r), T (r, D). Returns maps and rounds.
    """
    q, covariance = q.double(), covariance.double()
    mean = damped(covariance.mean(dim=(0, 1)))
    queries = q.mT @ q
    seen = (q.unsqueeze(-2) @ covariance).squeeze(-2)  # (heads, queries, D)

    def advance(maps: Maps, stretch: float) -> Maps:
        # The same product in a better conditioned basis: T Cov Tᵀ near the identity.
        root = _gram_root(maps.down, mean)
        up, down = maps.up @ root, torch.linalg.solve_triangular(root, maps.down, upper=False)
        inner = down @ covariance @ down.mT
        up = _descend(
            lambda u: q.mT @ ((q @ u).unsqueeze(-2) @ inner).squeeze(-2),
            q.mT @ (seen @ down.mT),
            up,
            _kronecker_inverse(queries, inner.mean(dim=1)),
        )
        turned = q @ up

        def apply(t: Tensor) -> Tensor:
            return (turned.mT @ ((turned @ t).unsqueeze(-2) @ covariance).squeeze(-2)).sum(dim=0)

        kronecker = _kronecker_inverse((turned.mT @ turned).sum(dim=0), mean)
        return Maps(up, _descend(apply, (turned.mT @ seen).sum(dim=0), down, kronecker))

    return _rounds(start, advance, lambda maps: attended_error(q, covariance, maps))


def attended_error(q: Tensor, covariance: Tensor, maps: Maps | None) -> Tensor:
    """Return what ``attended_maps`` minimises; without maps Σ q_mᵀ Cov_m q_m, the error of U T = 0."""
    left = q.double() if maps is None else q.double() - q.double() @ maps.up @ maps.down
    return (left.unsqueeze(-2) @ covariance.double() @ left.unsqueeze(-1)).sum()


def _rounds(
    maps: Maps, advance: Callable[[Maps, float], Maps], error: Callable[[Maps], Tensor]
) -> tuple[Maps, int]:
    """Advance until the error hardly falls; drop a round that would raise it.

    Plain alternating rounds creep along one direction. So a round steps ``stretch`` times as far as the least-squares
    solution, and ``stretch`` grows as long as the error falls.
    """
    best, stretch, slow = error(maps), 1.0, 0
    for count in range(ROUNDS):
        moved = advance(maps, stretch)
        reached = error(moved)
        if stretch > 1 and not bool((reached >= 0) & (reached < best)):
            stretch = 1.0
            moved = advance(maps, stretch)
            reached = error(moved)
        # No gain beyond rounding, which may even make the error negative.
        if not bool((reached >= 0) & (reached < best)):
            return maps, count
        maps, fall, best, stretch = moved, best - reached, reached, stretch * GROWTH
        # One slow round is often only the short step after a long one that overshot.
        slow = slow + 1 if bool(fall < FALL * best) else 0
        if slow == PATIENCE:
            return maps, count + 1
    return maps, ROUNDS


def _descend(
    apply: Linear, right: Tensor, start: Tensor, precondition: Linear, *, together: bool = False
) -> Tensor:
    """Take a few preconditioned conjugate gradient steps towards apply(X) = right.

    Leading dimensions are separate systems, unless ``together``.
    """

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum() if together else (x * y).sum(dim=(-2, -1), keepdim=True)

    def ratio(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(b > 0, a / b, 0.0)  # an exactly solved system takes no step

    x, residual = start, right - apply(start)
    direction = step = precondition(residual)
    energy = dot(residual, step)
    for _ in range(STEPS):
        moved = apply(direction)
        length = ratio(energy, dot(direction, moved))
        x, residual = x + length * direction, residual - length * moved
        step = precondition(residual)
        energy, before = dot(residual, step), energy
        direction = step + ratio(energy, before) * direction
    return x


def _kronecker_inverse(left: Tensor, right: Tensor) -> Linear:
    """Return X ↦ A⁻¹ X B⁻¹ for damped A and B."""
    a, b = damped_cholesky(left), damped_cholesky(right)
    return lambda x: b.solve(torch.cholesky_solve(x, a.factor))


def _diagonal(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return T with Tᵀ X T + Tᵀ Y T = I and both diagonal, the two diagonals, and the damping of a singular X + Y."""
    sum_root = damped_cholesky(one + other, damping=0.0)
    root = sum_root.factor
    inner = torch.linalg.solve_triangular(root, one, upper=False)
    inner = torch.linalg.solve_triangular(root, inner.mT, upper=False)
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    first = values.clamp(0.0, 1.0)
    turn = torch.linalg.solve_triangular(root.mT, vectors, upper=True)
    return turn, first, 1 - first, sum_root.damping


def _gram_root(down: Tensor, moment: Tensor) -> Tensor:
    """Return the Cholesky factor of T S Tᵀ, damped if singular: it only changes the basis of T."""
    return damped_cholesky(down @ moment @ down.mT, damping=0.0).factor


def _orthonormal(down: Tensor, moment: Tensor) -> Tensor:
    """Return a basis of the rows of ``down`` with T S Tᵀ = I."""
    return torch.linalg.solve_triangular(_gram_root(down, moment), down, upper=False)
