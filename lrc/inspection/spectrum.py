"""Spectra of targets, plain and whitened, and the conditioning of their moments."""

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
    """Return the spectra of a target, plain and whitened by its moment; see ``Inspected``."""
    if isinstance(problem, ProjectionProblem):
        weight = problem.matrix.weight
        plain, whitened = singular_values(weight), singular_values(weight, input_moment(problem))
    elif isinstance(problem, EmbeddingProblem):
        shares = problem.frequency.double().sqrt().unsqueeze(-1)
        plain, whitened = singular_values(problem.table), singular_values(shares * problem.table.double())
    elif isinstance(problem, QKProblem):
        plain, whitened = _of_scores(problem)
    elif isinstance(problem, OVProblem):
        plain, whitened = _of_values(problem)
    else:
        norms = problem.output.weight.double().norm(dim=0)
        plain, whitened = (each.sort(descending=True).values for each in (norms, neuron_scores(problem)))
    return spectrum(plain), spectrum(whitened)


def spectrum(values: Tensor) -> Spectrum:
    """Return the record of singular values (..., n), largest first; leading dimensions are heads."""
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
    """Return exp of the entropy of σ / Σσ (...,) of values σ (..., n) (Roy and Vetterli 2007); 0 if all are 0."""
    total = values.sum(dim=-1, keepdim=True)
    rank = torch.special.entr(values / total.where(total > 0, 1)).sum(dim=-1).exp()
    return rank.where(total.squeeze(-1) > 0, 0)


def stable_rank(values: Tensor) -> Tensor:
    """Return Σσ² / σ₁² (...,) of singular values σ (..., n), largest first; 0 if all are 0."""
    largest = values[..., 0].square()
    return values.square().sum(dim=-1) / largest.where(largest > 0, 1)


def conditioning(layer: int, site: str, moment: Moment, *, centred: bool) -> Conditioning:
    """Return the conditioning of a site's moment, or of its covariance if ``centred``, with and without damping."""
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
        # A float32 sum can have a negative eigenvalue; the damping is larger, or there would be no factor.
        damped=(most + added) / (least + added) if most > 0 else 1.0,
        damping=root.damping,
        numerical_rank=int((values > tolerance).sum()),
    )


def _of_scores(problem: QKProblem) -> tuple[Tensor, Tensor]:
    heads, moment = problem.heads, problem.input
    (q, q_bias), (k, k_bias) = by_head(problem.q, heads.heads), by_head(problem.k, heads.kv_heads)
    grams = (q @ q.mT, k @ k.mT), (output_moment(q, q_bias, moment), output_moment(k, k_bias, moment))
    plain, whitened = (
        product_singular_values(left, right.repeat_interleave(heads.group, dim=0)) for left, right in grams
    )
    return plain, whitened


def _of_values(problem: OVProblem) -> tuple[Tensor, Tensor]:
    heads = problem.heads
    readers = problem.o.weight.double().unflatten(1, (heads.heads, -1)).transpose(0, 1)
    values = problem.v.weight.double().unflatten(0, (heads.kv_heads, -1))
    grams = readers.mT @ readers
    own = diagonal_blocks(attention_output(problem)[1], heads.heads)
    by_query = (values @ values.mT).repeat_interleave(heads.group, dim=0)
    return product_singular_values(grams, by_query), product_singular_values(grams, own)


def neuron_scores(problem: MLPProblem) -> Tensor:
    """Return (C_ii)^½ ‖w_i‖ of every neuron i, C centred where the output has a bias."""
    c = problem.hidden.second if problem.output.bias is None else problem.hidden.double().centred
    return c.diagonal().double().clamp_min(0).sqrt() * problem.output.weight.double().norm(dim=0)
