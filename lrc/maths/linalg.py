"""Dense linear algebra of the methods, in float64; leading dimensions are batches.

Most functions solve one problem: given the moment C of an input and a Gram matrix H of the maps that read it, find the
rank-r map P that minimises tr(H (I − P) C (I − P)ᵀ). Truncated, whitened and two-sided whitened SVD have H = WᵀGW,
queries and keys H = E[q qᵀ], values and outputs H = OᵀGO.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.errors import UserError

DAMPING = 1e-6
_SMALLEST_DAMPING, _LARGEST_DAMPING = 1e-12, 1e-2
_SHARED = 0.05  # largest squared partial correlation of two columns that may be dropped together
COLUMN_BYTES = 2**28  # of a moment's columns converted to float64 at once


@dataclass(frozen=True)
class Cholesky:
    """Hold the lower factor of ``matrix`` = C + ``damping``·mean(diag C)·I, with the damping that was used."""

    factor: Tensor
    matrix: Tensor
    damping: float

    def solve(self, right: Tensor) -> Tensor:
        """Return X with X · ``matrix`` = ``right`` (..., m, n)."""
        return torch.cholesky_solve(right.mT, self.factor).mT


def damped(c: Tensor, damping: float = DAMPING) -> Tensor:
    """Return C + ``damping``·mean(diag C)·I in float64 for C (..., n, n); a copy unless ``damping`` is 0."""
    if not damping:
        return c.double()
    matrix = c.to(torch.float64, copy=True)
    matrix.diagonal(dim1=-2, dim2=-1).add_(damping * _mean_diagonal(c).unsqueeze(-1))
    return matrix


def _mean_diagonal(c: Tensor) -> Tensor:
    """Return mean(diag C) (...,) in float64, or 1 where it is 0 (a dead head): a zero moment has no scale."""
    mean = c.diagonal(dim1=-2, dim2=-1).double().mean(dim=-1)
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def damped_cholesky(c: Tensor, damping: float = DAMPING) -> Cholesky:
    """Factor a positive semidefinite C (..., n, n), damped relative to the mean of its diagonal.

    A float32 sum may be indefinite by more than ``damping``; damping then grows tenfold until the factor exists. Raises
    UserError if a hundredth of the mean diagonal is not enough.
    """
    largest = max(damping, _LARGEST_DAMPING)
    while damping <= largest:
        matrix = damped(c, damping)
        factor, info = torch.linalg.cholesky_ex(matrix)
        # cholesky_ex reports no error for an infinite entry.
        if not bool(info.any()) and bool(factor.diagonal(dim1=-2, dim2=-1).isfinite().all()):
            return Cholesky(factor, matrix, damping)
        damping = max(10 * damping, _SMALLEST_DAMPING)
    raise UserError("a moment is not positive semidefinite; are there NaN or inf in the activations?")


@dataclass(frozen=True)
class Projector:
    """Hold the rank-r map ``up`` (..., n, r) @ ``down`` (..., r, n) and the damping of its moment."""

    up: Tensor
    down: Tensor
    damping: float


def best_projector(c: Tensor | None, h: Tensor, rank: int) -> Projector:
    """Minimise tr(H (I − P) C (I − P)ᵀ) over rank-r P, for C and H of shape (..., n, n); C = None is the identity.

    With C = L Lᵀ and V the top eigenvectors of LᵀHL, P = (L V)(Vᵀ L⁻¹). At full rank P is the identity.
    """
    h = h.double()
    if c is None:
        top = _top_eigenvectors(h, rank)
        return Projector(top, top.mT, 0.0)
    root = damped_cholesky(c)
    low = root.factor
    top = _top_eigenvectors(low.mT @ h @ low, rank)
    # Vᵀ L⁻¹ = (L⁻ᵀ V)ᵀ
    down = torch.linalg.solve_triangular(low.mT, top, upper=True).mT
    return Projector(low @ top, down, root.damping)


def best_pair(
    weight: Tensor, rank: int, c: Tensor | None = None, g: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """Return the rank-r B (m, r) and A (r, n) that minimise ‖G^½ (W − BA) C^½‖_F for W (m, n), and the damping used.

    C (n, n) is the moment of the input, G (m, m) that of the loss gradient at the output; None is the identity. This
    is truncated SVD (Eckart-Young-Mirsky), whitened SVD (SVD-LLM, arXiv:2403.07378) or its two-sided form. It works in
    the smaller dimension.
    """
    w = weight.double()
    rows, columns = w.shape[-2:]
    if rows < columns:
        inner, damping = _gram(w, c)
        p = best_projector(g, inner, rank)  # of the transposed problem
        pair = balanced(p.down.mT, p.up.mT @ w)
    else:
        inner, damping = _gram(w.mT, g)
        p = best_projector(c, inner, rank)
        pair = balanced(w @ p.up, p.down)
    return *pair, max(damping, p.damping)


def balanced(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite the product B (m, r) A (r, n) as (U Σ^½)(Σ^½ Vᵀ), so that both factors have one scale for low precision.

    With B = Q R, U and Σ² are the eigenvectors and eigenvalues of R A AᵀRᵀ, which is much cheaper than an SVD. Squares
    cannot resolve singular values below 1e-8 of the largest: their directions are kept, scaled as if at that bound.
    """
    q, r = torch.linalg.qr(b)
    inner = r @ a
    squares, u = torch.linalg.eigh(inner @ inner.mT)
    squares, u = squares.flip(-1), u.flip(-1)
    least = torch.finfo(squares.dtype).eps * squares[..., :1]
    root = squares.clamp_min(least).clamp_min(torch.finfo(squares.dtype).tiny) ** 0.25
    return (q @ u) * root.unsqueeze(-2), (u.mT @ inner) / root.unsqueeze(-1)


def regress(weight: Tensor, c: Tensor, reader: Tensor) -> tuple[Tensor, float]:
    """Return the W' that minimises E‖W x − W' T x‖², W C Tᵀ (T C Tᵀ)⁻¹ for T = ``reader``, and the damping used.

    Both C are damped alike, so an invertible T gives W T⁻¹ exactly. Shapes: W (m, n), C (n, n), T (r, n), W' (m, r).
    """
    c = damped(c)
    through = c @ reader.double().mT
    root = damped_cholesky(reader.double() @ through, damping=0.0)
    return root.solve(weight.double() @ through), DAMPING + root.damping


def regress_kept(weight: Tensor, c: Tensor, kept: Tensor) -> tuple[Tensor, float]:
    """Return ``regress`` for a T that selects the coordinates ``kept`` (r,) of x, without all of C in float64."""
    weight, ridge = weight.double(), DAMPING * _mean_diagonal(c)
    right = ridge * weight[:, kept]
    for part in torch.arange(len(kept), device=kept.device).split(_columns_at_once(c)):
        right[:, part] += weight @ c[:, kept[part]].double()
    inner = c[kept.unsqueeze(-1), kept].double()
    inner.diagonal().add_(ridge)
    root = damped_cholesky(inner, damping=0.0)
    return root.solve(right), DAMPING + root.damping


def column_part(n: int) -> int:
    """Return the elements of the columns of an (n, n) moment that are in float64 at once."""
    return min(n**2, COLUMN_BYTES // 8)


def eliminate_columns(weight: Tensor, c: Tensor, keep: int, block: int | None = None) -> tuple[Tensor, float]:
    """Choose ``keep`` columns of W (m, n) by backward elimination under E‖W x − W' x_S‖², refitting W' as it goes.

    Returns their indices (keep,), ascending, and the damping used. C (n, n) is the moment of x. This is optimal brain
    surgeon for columns: with P = C⁻¹ and W̃ the refit so far, dropping column i costs ‖W̃_i‖² / P_ii; then
    W̃ −= W̃_i P_i / P_ii and P −= P_iᵀ P_i / P_ii. The ``block`` cheapest columns go at once (None: a 64th of those
    left), except near copies of a cheaper one: of two copies only one can go.
    """
    root = damped_cholesky(c)
    inverse = torch.cholesky_inverse(root.factor)
    fitted = weight.to(torch.float64, copy=True)
    gone = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    there = weight.shape[1]
    while there > keep:
        count = min(block or max(there // 64, 1), there - keep)
        score = (fitted.square().sum(dim=0) / inverse.diagonal()).masked_fill(gone, torch.inf)
        cheap = score.topk(min(2 * count, there), largest=False).indices
        among, diagonal = inverse[cheap][:, cheap], inverse.diagonal()[cheap]
        shared = among.square() / (diagonal * diagonal.unsqueeze(-1))  # squared partial correlations
        drop = cheap[shared.triu(1).amax(dim=0) < _SHARED][:count]
        rows = inverse[drop]
        step = torch.cholesky_solve(rows, torch.linalg.cholesky(rows[:, drop]))
        fitted.addmm_(fitted[:, drop], step, alpha=-1)
        inverse.addmm_(rows.mT, step, alpha=-1)
        gone[drop] = True
        # Rounding could leave the diagonal of a dropped column at 0 or below.
        inverse.diagonal()[drop] = 1.0
        there -= len(drop)
    return gone.logical_not().nonzero().squeeze(-1), root.damping


def eliminate(gram: Tensor, keep: int) -> Tensor:
    """Drop a set D of low cost 1_Dᵀ K 1_D for K = ``gram`` (..., n, n); return the ``keep`` other indices, ascending.

    Backward elimination drops the index that gives the cheapest set, one at a time; members may cancel, so the cost
    need not grow. Then the best swap of a dropped and a kept index is made while it lowers the cost.
    """
    gram = gram.double()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    gone = torch.zeros(gram.shape[:-1], dtype=torch.bool, device=gram.device)
    pull = torch.zeros_like(diagonal)  # Σ_{i in D} K_ij
    for _ in range(gram.shape[-1] - keep):
        index = (diagonal + 2 * pull).masked_fill(gone, torch.inf).argmin(dim=-1, keepdim=True)
        gone = gone.scatter(-1, index, True)
        pull = pull + _rows(gram, index)
    # A smaller change may be rounding.
    least = -1e-12 * diagonal.abs().sum(dim=-1, keepdim=True)
    while True:
        # change of the cost when i comes back and j goes
        change = (diagonal - 2 * pull).unsqueeze(-1) + (diagonal + 2 * pull).unsqueeze(-2) - 2 * gram
        change = change.masked_fill(gone.logical_not().unsqueeze(-1) | gone.unsqueeze(-2), torch.inf)
        best, place = change.flatten(-2).min(dim=-1, keepdim=True)
        better = best < least
        if not bool(better.any()):
            return gone.logical_not().nonzero()[:, -1].unflatten(0, (*gone.shape[:-1], keep))
        back, out = place // gram.shape[-1], place % gram.shape[-1]
        swapped = gone.scatter(-1, back, False).scatter(-1, out, True)
        gone = torch.where(better, swapped, gone)
        pull = torch.where(better, pull - _rows(gram, back) + _rows(gram, out), pull)


def _rows(gram: Tensor, index: Tensor) -> Tensor:
    """Return row ``index`` (..., 1) of every matrix (..., n, n)."""
    return gram.gather(-2, index.unsqueeze(-1).expand(*index.shape, gram.shape[-1])).squeeze(-2)


def direction_scores(weight: Tensor, c: Tensor, g: Tensor) -> Tensor:
    """Return σ_i² (u_iᵀ G u_i)(v_iᵀ C v_i) for every singular direction of W (m, n), by ascending σ: (min(m, n),).

    Dropping direction i alone adds half of its score to ½ tr(G ΔW C ΔWᵀ). It works in the smaller dimension, where
    σ v = Wᵀ u or σ u = W v.
    """
    w, c, g = weight.double(), c.double(), g.double()
    if w.shape[0] > w.shape[1]:
        v = torch.linalg.eigh(w.mT @ w).eigenvectors
        written = w @ v
        return (written * (g @ written)).sum(dim=0) * (v * (c @ v)).sum(dim=0)
    u = torch.linalg.eigh(w @ w.mT).eigenvectors
    taken = w.mT @ u
    return (taken * (c @ taken)).sum(dim=0) * (u * (g @ u)).sum(dim=0)


def singular_values(weight: Tensor, c: Tensor | None = None) -> Tensor:
    """Return the singular values (..., min(m, n)), largest first, of W C^½ for a damped C; None is the identity.

    They are roots of the eigenvalues of a Gram matrix, so that values below 1e-8 of the largest are rounding.
    """
    w = weight.double()
    rows, columns = w.shape[-2:]
    if rows < columns:
        gram = _gram(w, c)[0]
    elif c is None:
        gram = w.mT @ w
    else:
        low = damped_cholesky(c).factor
        gram = (w @ low).mT @ (w @ low)
    return _roots_of_eigenvalues(gram)


def product_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Return the singular values (..., D), largest first, of A B from ``left`` = AᵀA and ``right`` = B Bᵀ."""
    root = symmetric_root(right)
    return _roots_of_eigenvalues(root @ left.double() @ root)


def symmetric_root(matrix: Tensor) -> Tensor:
    """Return the positive semidefinite root (..., n, n) of a symmetric matrix; negative eigenvalues count as zero."""
    values, vectors = torch.linalg.eigh((matrix.double() + matrix.double().mT) / 2)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT


def gram_root(g: Tensor) -> tuple[Tensor, float]:
    """Return R with RᵀR = G + damping for G (..., n, n), and the damping: tr(Wᵀ G W) = ‖R W‖²."""
    root = damped_cholesky(g)
    return root.factor.mT, root.damping


def data_error(delta: Tensor, c: Tensor) -> float:
    """Return E‖ΔW x‖² for ΔW (m, n) and C = E[x xᵀ] (n, n)."""
    return data_errors(delta, c, None)[0]


def data_errors(delta: Tensor, c: Tensor, *metrics: Tensor | None) -> list[float]:
    """Return tr(G ΔW C ΔWᵀ) for each metric G (m, m); None is the identity. ΔW is (m, n), C (n, n)."""
    delta = delta.double()
    lefts = [delta if g is None else g.double() @ delta for g in metrics]
    total = torch.zeros(len(lefts), dtype=torch.float64, device=delta.device)
    for part in torch.arange(c.shape[-1], device=c.device).split(_columns_at_once(c)):
        through = delta @ c[:, part].double()
        total += torch.stack([(through * left[:, part]).sum() for left in lefts])
    # A float32 C may be slightly indefinite.
    return [max(error, 0.0) for error in total.tolist()]


def _columns_at_once(c: Tensor) -> int:
    return max(COLUMN_BYTES // (8 * c.shape[-1]), 1)


def _gram(w: Tensor, moment: Tensor | None) -> tuple[Tensor, float]:
    """Return W M Wᵀ for a damped moment M (None is the identity), and the damping.

    Undamped, a singular M would leave the order of directions outside its range arbitrary.
    """
    if moment is None:
        return w @ w.mT, 0.0
    root = damped_cholesky(moment)
    return w @ root.matrix @ w.mT, root.damping


def _top_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """Return the eigenvectors (..., n, r) of the r largest eigenvalues, largest first."""
    symmetric = (symmetric + symmetric.mT) / 2
    return torch.linalg.eigh(symmetric).eigenvectors[..., -rank:].flip(-1)


def _roots_of_eigenvalues(symmetric: Tensor) -> Tensor:
    """Return the roots (..., n) of the eigenvalues, largest first; negative ones are rounding and count as zero."""
    return torch.linalg.eigvalsh((symmetric + symmetric.mT) / 2).flip(-1).clamp_min(0).sqrt()
