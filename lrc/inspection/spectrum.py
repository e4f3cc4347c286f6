"""Spectra of targets, plain and whitened, and how well the moments behind them can be inverted."""

from __future__ import annotations

import torch
from torch import Tensor

from lrc.maths.linalg import damped_cholesky, product_singular_values, singular_values
from lrc.methods.a3 import attention_output, diagonal_blocks
from lrc.methods.contract import (
    EmbeddingProblem,
    MLPProblem,
    OVProblem,
    Problem,
    ProjectionProblem,
    QKProblem,
)
from lrc.methods.shared.pairs import input_moment
from lrc.methods.shared.scores import by_head, output_moment
from lrc.moments.moment import Moment
from lrc.records.inspection import Conditioning, Spectrum

POINTS = 64  # of a curve of energy
_MOST = 0.99


def spectra(problem: Problem) -> tuple[Spectrum, Spectrum]:
    """The spectrum of a target by itself, and of the same in the metric of its moment; see ``Inspected``."""
    if isinstance(problem, ProjectionProblem):
        weight = problem.matrix.weight
        found = singular_values(weight), singular_values(weight, input_moment(problem))
    elif isinstance(problem, EmbeddingProblem):
        shares = problem.frequency.double().sqrt().unsqueeze(-1)
        found = singular_values(problem.table), singular_values(shares * problem.table.double())
    elif isinstance(problem, QKProblem):
        found = _of_scores(problem)
    elif isinstance(problem, OVProblem):
        found = _of_values(problem)
    else:
        found = _of_neurons(problem)
    plain, whitened = (spectrum(values) for values in found)
    return plain, whitened


def spectrum(values: Tensor) -> Spectrum:
    """The record of singular values (..., n), largest first, leading dimensions being heads."""
    full = values.shape[-1]
    squares = values.square()
    ranks = torch.logspace(0, torch.tensor(float(full)).log10().item(), POINTS, dtype=torch.float64)
    ranks = ranks.round().long().clamp(1, full).unique()
    energy = squares.flatten(0, -2).sum(dim=0) if values.ndim > 1 else squares
    shares = energy.cumsum(0) / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
    return Spectrum(
        full=full,
        effective_rank=float(effective_rank(values).mean()),
        stable_rank=float(stable_rank(values).mean()),
        rank_99=min(int((shares < _MOST).sum()) + 1, full),
        ranks=ranks.tolist(),
        energy=shares[ranks.to(shares.device) - 1].tolist(),
    )


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of σ / Σσ (...,) for singular values (..., n); 0 where all are (Roy and Vetterli 2007)."""
    total = values.sum(dim=-1, keepdim=True)
    shares = values / torch.where(total > 0, total, torch.ones_like(total))
    rank = torch.special.entr(shares).sum(dim=-1).exp()
    return torch.where(total.squeeze(-1) > 0, rank, torch.zeros_like(rank))


def stable_rank(values: Tensor) -> Tensor:
    """Σσ² / σ₁² (...,) of singular values (..., n), largest first; 0 where all are."""
    largest = values[..., 0].square()
    rank = values.square().sum(dim=-1) / torch.where(largest > 0, largest, torch.ones_like(largest))
    return torch.where(largest > 0, rank, torch.zeros_like(rank))


def conditioning(layer: int, site: str, moment: Moment, *, centred: bool) -> Conditioning:
    """How well the moment of a site, or its covariance where ``centred``, can be inverted, with damping and without."""
    c = moment.centred if centred else moment.second
    values = torch.linalg.eigvalsh(c.double())
    root = damped_cholesky(c)
    added = root.damping * float(c.diagonal().double().mean())
    least, most = float(values[0]), float(values[-1])
    tolerance = len(c) * torch.finfo(torch.float32).eps * most
    return Conditioning(
        layer=layer,
        site=site,
        width=len(c),
        tokens=moment.tokens,
        centred=centred,
        condition=most / least if least > 0 else float("inf"),
        # A float32 sum may have an eigenvalue below zero; what is added outweighs it, or there would be no factor.
        damped=(most + added) / (least + added) if most > 0 else 1.0,
        damping=root.damping,
        numerical_rank=int((values > tolerance).sum()),
    )


def _of_scores(problem: QKProblem) -> tuple[Tensor, Tensor]:
    heads, moment = problem.heads, problem.input
    (q, q_bias), (k, k_bias) = by_head(problem.q, heads.heads), by_head(problem.k, heads.kv_heads)

    def of(left: Tensor, right: Tensor) -> Tensor:
        return product_singular_values(left, right.repeat_interleave(heads.group, dim=0))

    moments = output_moment(q, q_bias, moment), output_moment(k, k_bias, moment)
    return of(q @ q.mT, k @ k.mT), of(*moments)


def _of_values(problem: OVProblem) -> tuple[Tensor, Tensor]:
    heads = problem.heads
    readers = problem.o.weight.double().unflatten(1, (heads.heads, -1)).transpose(0, 1)
    values = problem.v.weight.double().unflatten(0, (heads.kv_heads, -1))
    grams = readers.mT @ readers
    own = diagonal_blocks(attention_output(problem)[1], heads.heads)
    by_query = (values @ values.mT).repeat_interleave(heads.group, dim=0)
    return product_singular_values(grams, by_query), product_singular_values(grams, own)


def _of_neurons(problem: MLPProblem) -> tuple[Tensor, Tensor]:
    bias, moment = problem.output.bias, problem.hidden
    c = moment.second if bias is None else moment.double().centred
    norms = problem.output.weight.double().norm(dim=0)
    scores = c.diagonal().double().clamp_min(0).sqrt() * norms
    return norms.sort(descending=True).values, scores.sort(descending=True).values
