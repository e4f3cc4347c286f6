"""Shrink queries and keys: by a map for every head or, with rotary positions, by a choice of pairs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lrc.maths.alternating import Maps, attended_error, attended_maps
from lrc.maths.linalg import best_projector, eliminate
from lrc.methods.contract import Affine, MLPProblem, OVProblem, Prediction, QKProblem, Solution
from lrc.moments.attention import Attention, AttentionMoment
from lrc.moments.attention_samples import AttentionSamples, Samples
from lrc.moments.moment import Moment

ScoreMetric = Literal["attention", "score", "loss", "attention_als"]

# Against overfitting to few queries, covariances are shrunk to their mean, as if _PRIOR·head_dim more queries had it.
_PRIOR = 8


def best_map(problem: QKProblem, rank: int, metric: ScoreMetric) -> Solution:
    """Return the optimum without rotary positions, for queries independent of keys (or of gradients)."""
    heads, group = problem.heads, problem.heads.group
    # Covariances are summed over a group, as its queries are; each query gets the mean.
    if metric == "score":
        keys, share, name = output_moment(*by_head(problem.k, heads.kv_heads), problem.input), 1.0, "scores"
    elif metric == "loss":
        keys, share, name = loss_gradient(problem).double(), 1 / (2 * group), "loss"
    else:
        attention = _attention(problem)
        keys, share = attention.covariance.double(), attention.scale**2 / (2 * heads.heads * group)
        name = "kl"
    q_moment = output_moment(*by_head(problem.q, heads.heads), problem.input)
    shared = q_moment.unflatten(0, (-1, group)).sum(dim=1)
    p = best_projector(keys, shared, rank)
    delta = torch.eye(heads.head_dim, dtype=p.up.dtype, device=p.up.device) - p.up @ p.down
    error = share * _score_error(shared, delta, keys)
    up, size = p.up.mT.repeat_interleave(group, dim=0), share * _score_error(shared, None, keys)
    loss = _map_loss(problem, delta.repeat_interleave(group, dim=0))
    return Solution(
        parts={"q": _mapped(up, problem.q), "k": _mapped(p.down, problem.k)},
        predicted=Prediction(error, size, name, loss),
        numerics={"damping": p.damping},
    )


def fitted_map(problem: QKProblem, rank: int) -> Solution:
    """Fit maps without rotary positions by alternating least squares to sampled queries and the keys they attend to."""
    heads = problem.heads
    samples: AttentionSamples = problem.statistics[Samples.name]
    q_moment = (samples.q.double().mT @ samples.q.double()).sum(dim=1)
    p = best_projector(samples.covariance.mean(dim=(1, 2), dtype=torch.float64), q_moment, rank)
    ups, downs, errors, sizes, most = [], [], [], [], 0
    # One key head at a time: its covariances in float64 are large.
    for head, (q, covariance) in enumerate(zip(samples.q, samples.covariance, strict=True)):
        maps = Maps(p.up[head].expand(heads.group, -1, -1), p.down[head])
        if rank < heads.head_dim:
            weight = _PRIOR * heads.head_dim / (_PRIOR * heads.head_dim + covariance[..., 0, 0].numel())
            steady = covariance.double().lerp(covariance.double().mean(dim=(0, 1)), weight)
            maps, rounds = attended_maps(q, steady, maps)
            most = max(most, rounds)
        ups.append(maps.up)
        downs.append(maps.down)
        errors.append(attended_error(q, covariance, maps))
        sizes.append(attended_error(q, covariance, None))
    share = 1 / (2 * heads.heads * samples.q.shape[2])
    up, down = torch.cat(ups), torch.stack(downs)
    eye = torch.eye(heads.head_dim, dtype=up.dtype, device=up.device)
    loss = _map_loss(problem, eye - up @ down.repeat_interleave(heads.group, dim=0))
    return Solution(
        parts={"q": _mapped(up.mT, problem.q), "k": _mapped(down, problem.k)},
        predicted=Prediction(share * float(sum(errors)), share * float(sum(sizes)), "kl", loss),
        numerics={"damping": p.damping, "rounds": most},
    )


def kept_pairs(problem: QKProblem, rank: int, metric: ScoreMetric) -> Solution:
    """Keep rank / 2 whole rotary pairs of every key head: their first halves, then their second halves."""
    heads, group = problem.heads, problem.heads.group
    if metric == "score":
        q_energy = _pair_energy(output_moment(*by_head(problem.q, heads.heads), problem.input))
        k_energy = _pair_energy(output_moment(*by_head(problem.k, heads.kv_heads), problem.input))
        product = q_energy * k_energy.repeat_interleave(group, dim=0)  # (heads, D/2)
        kept = product.sqrt().unflatten(0, (-1, group)).sum(dim=1).topk(rank // 2).indices.sort().values
        # This assumes that the relative angle of two positions is uniform.
        gram, name = torch.diag_embed(product.unflatten(0, (-1, group)).sum(dim=1)), "scores"
    elif metric == "loss":
        gram, name = loss_gradient(problem).double(), "loss"
        kept = eliminate(gram, rank // 2)
    else:
        pairs = _attention(problem).pairs
        assert pairs is not None
        gram, name = pairs.double() / heads.heads, "kl"
        kept = eliminate(gram, rank // 2)
    lost = torch.ones_like(gram[..., 0]).scatter(-1, kept, 0.0)
    columns = torch.cat([kept, kept + heads.head_dim // 2], dim=-1)  # (kv_heads, rank)
    keep = torch.eye(heads.head_dim, dtype=gram.dtype, device=gram.device)[columns]
    loss = None if problem.gradient is None else _pair_cost(problem.gradient.double(), lost)
    return Solution(
        parts={"q": _mapped(keep.repeat_interleave(group, dim=0), problem.q), "k": _mapped(keep, problem.k)},
        predicted=Prediction(_pair_cost(gram, lost), float(gram.sum() / 2), name, loss),
        rotary_columns=columns,
    )


def _pair_cost(gram: Tensor, lost: Tensor) -> float:
    """Return ½·1_Sᵀ K 1_S summed over key heads, for the set S of pairs that are 1 in ``lost`` (kv_heads, D/2)."""
    return float(torch.einsum("hi,hij,hj->", lost, gram, lost)) / 2


def _map_loss(problem: QKProblem, delta: Tensor) -> float | None:
    """Return ½ Σ_heads tr(S_q Δ S_γ Δᵀ) in nats for Δ (heads, D, D), S_γ a group's mean; None without gradients."""
    if problem.gradient is None:
        return None
    heads = problem.heads
    slopes = problem.gradient.double().repeat_interleave(heads.group, dim=0)
    q_moment = output_moment(*by_head(problem.q, heads.heads), problem.input)
    return _score_error(q_moment, delta, slopes) / (2 * heads.group)


def loss_gradient(problem: QKProblem | OVProblem | MLPProblem) -> Tensor:
    """Return the moment of the loss's gradients that the metric ``loss`` needs."""
    assert problem.gradient is not None, "the loss metric is solved with the gradients"
    return problem.gradient


def _attention(problem: QKProblem) -> AttentionMoment:
    return problem.statistics[Attention.name]


def by_head(matrix: Affine, heads: int) -> tuple[Tensor, Tensor]:
    """Return the weight (heads, D, n) and the bias (heads, D), zero if there is none."""
    weight = matrix.weight.double().unflatten(0, (heads, -1))
    bias = weight.new_zeros(weight.shape[:2]) if matrix.bias is None else matrix.bias.double().view(heads, -1)
    return weight, bias


def output_moment(weight: Tensor, bias: Tensor, moment: Moment) -> Tensor:
    """Return E[y yᵀ] (heads, D, D) of y = W x + b, from the moment of x."""
    moment = moment.double()
    cross = (weight @ moment.mean).unsqueeze(-1) * bias.unsqueeze(-2)
    return weight @ moment.second @ weight.mT + cross + cross.mT + bias.unsqueeze(-1) * bias.unsqueeze(-2)


def _score_error(q: Tensor, delta: Tensor | None, k: Tensor) -> float:
    """Return Σ_heads tr(S_q Δ S_k Δᵀ) = Σ E(qᵀ Δ k)² for independent q and k; Δ = None is the identity."""
    inner = k if delta is None else delta @ k @ delta.mT
    return max(float((q * inner.mT).sum()), 0.0)


def _pair_energy(moment: Tensor) -> Tensor:
    """Return E‖(y_i, y_{i+D/2})‖² (heads, D/2) from E[y yᵀ]; rotation does not change it."""
    first, second = moment.diagonal(dim1=-2, dim2=-1).clamp_min(0).chunk(2, dim=-1)
    return first + second


def _mapped(maps: Tensor, matrix: Affine) -> Affine:
    """Map the rows of every head by its own (rank, D) matrix."""
    weight, bias = by_head(matrix, maps.shape[0])
    mapped = None if matrix.bias is None else (maps @ bias.unsqueeze(-1)).flatten()
    return Affine((maps @ weight).flatten(0, 1), mapped)
