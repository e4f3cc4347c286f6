"""A3: shrinks the inner dimensions that queries and keys, values and outputs, and the MLP's matrices share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lrc.linalg import best_projector, data_error, eliminate, eliminate_columns, regress, regress_kept
from lrc.methods.contract import (
    Affine,
    MLPProblem,
    OVProblem,
    Prediction,
    QKProblem,
    Solution,
    solves,
)
from lrc.moments.attention import AttentionMoment
from lrc.moments.moment import Moment
from lrc.plan.size import ComponentRank

PAPER = "A3, arXiv:2505.12942"
Refit = Literal["least_squares", "none"]


@solves(
    "qk",
    size=ComponentRank(),
    option_needs={("metric", "attention"): "attention"},
    paper=f"{PAPER}; attention metric: lrc",
)
def solve_qk(
    problem: QKProblem, rank: int, *, metric: Literal["attention", "score"] = "attention"
) -> Solution:
    """Keep the ``rank`` dimensions of every head that carry the attention scores.

    Without rotary positions: the map P minimising E(qᵀk − qᵀPk)² for independent q and k, summed over the heads that
    share the key; with them only whole pairs (i, i + D/2) can go. ``score`` is the published rule: E[k kᵀ] for the
    keys, pairs by (E‖q_i‖² E‖k_i‖²)^½. ``attention`` counts what softmax notices: the covariance of the keys that a
    query attends to, and backward elimination of pairs in the Gram matrix of their shares of the score.
    """
    attention = None
    if metric == "attention":
        assert problem.attention is not None, "the attention metric is solved with the attention statistic"
        attention = problem.attention
    solve = _position_free if problem.heads.rotary == "none" else _rotary
    return solve(problem, rank, attention)


def _position_free(problem: QKProblem, rank: int, attention: AttentionMoment | None) -> Solution:
    heads, group = problem.heads, problem.heads.group
    q_moment = _output_moment(*_by_head(problem.q, heads.heads), problem.input)
    shared = q_moment.unflatten(0, (-1, group)).sum(dim=1)
    if attention is None:
        keys, share = _output_moment(*_by_head(problem.k, heads.kv_heads), problem.input), 1.0
    else:
        # Of the group's covariances, summed as its queries are, the mean goes with every query.
        keys, share = attention.covariance.double(), attention.scale**2 / (2 * heads.heads * group)
    p = best_projector(keys, shared, rank)
    delta = torch.eye(heads.head_dim, dtype=p.up.dtype, device=p.up.device) - p.up @ p.down
    return Solution(
        parts={
            "q": _mapped(p.up.mT.repeat_interleave(group, dim=0), problem.q),
            "k": _mapped(p.down, problem.k),
        },
        predicted=Prediction(
            share * _score_error(shared, delta, keys),
            share * _score_error(shared, None, keys),
            "scores" if attention is None else "kl",
        ),
        numerics={"damping": p.damping},
    )


def _rotary(problem: QKProblem, rank: int, attention: AttentionMoment | None) -> Solution:
    heads, group = problem.heads, problem.heads.group
    if attention is None:
        q_energy = _pair_energy(_output_moment(*_by_head(problem.q, heads.heads), problem.input))
        k_energy = _pair_energy(_output_moment(*_by_head(problem.k, heads.kv_heads), problem.input))
        product = q_energy * k_energy.repeat_interleave(group, dim=0)  # (heads, D/2)
        kept = product.sqrt().unflatten(0, (-1, group)).sum(dim=1).topk(rank // 2).indices.sort().values
        # The relative angle of two positions is taken as uniform.
        gram, name = torch.diag_embed(product.unflatten(0, (-1, group)).sum(dim=1)), "scores"
    else:
        assert attention.pairs is not None
        gram, name = attention.pairs.double() / heads.heads, "kl"
        kept = eliminate(gram, rank // 2)
    lost = torch.ones_like(gram[..., 0]).scatter(-1, kept, 0.0)
    error = torch.einsum("hi,hij,hj->", lost, gram, lost) / 2
    columns = torch.cat([kept, kept + heads.head_dim // 2], dim=-1)  # (kv_heads, rank)
    keep = torch.eye(heads.head_dim, dtype=gram.dtype, device=gram.device)[columns]
    return Solution(
        parts={
            "q": _mapped(keep.repeat_interleave(group, dim=0), problem.q),
            "k": _mapped(keep, problem.k),
        },
        predicted=Prediction(float(error), float(gram.sum() / 2), name),
        rotary_columns=columns,
    )


@solves("ov", size=ComponentRank(), paper=PAPER)
def solve_ov(problem: OVProblem, rank: int, *, refit: Refit = "least_squares") -> Solution:
    """Keep the ``rank`` dimensions of every value head that the output projection reads.

    T (rank, D) of a value head comes from the stack of O_h S̄^½ over the query heads that share it. ``least_squares``
    then fits the output projection jointly over all heads, whose errors are correlated; ``none`` is the published
    rule, each head by itself. A value bias folds into the output bias, since attention rows sum to one.
    """
    heads, group, weight = problem.heads, problem.heads.group, problem.o.weight.double()
    moment = problem.output.double()
    biased = problem.v.bias is not None or problem.o.bias is not None
    offset = torch.zeros_like(moment.mean)
    if problem.v.bias is not None:
        offset = (
            problem.v.bias.double()
            .unflatten(0, (heads.kv_heads, -1))
            .repeat_interleave(group, dim=0)
            .flatten()
        )
    free = moment.shifted(offset)  # of the attention output before the value bias
    c = free.centred if biased else free.second
    own = _diagonal_blocks(c, heads.heads)
    readers = weight.unflatten(1, (heads.heads, -1)).transpose(0, 1)  # (heads, hidden, D)
    gram = (readers.mT @ readers).unflatten(0, (-1, group)).sum(dim=1)
    p = best_projector(own.unflatten(0, (-1, group)).mean(dim=1), gram, rank)
    reduce = torch.block_diag(*p.down.repeat_interleave(group, dim=0))  # (heads·rank, heads·D)
    numerics = {"damping": p.damping}
    if refit == "least_squares":
        output, numerics["refit_damping"] = regress(weight, c, reduce)
    else:
        output = (readers @ p.up.repeat_interleave(group, dim=0)).transpose(0, 1).flatten(1)
    bias = None
    if biased:
        bias = weight @ moment.mean - output @ (reduce @ free.mean)
        bias = bias if problem.o.bias is None else bias + problem.o.bias.double()
    values = problem.v.weight.double().unflatten(0, (heads.kv_heads, -1))
    return Solution(
        parts={"v": Affine((p.down @ values).flatten(0, 1)), "o": Affine(output, bias)},
        predicted=Prediction(
            data_error(weight - output @ reduce, c), data_error(weight, moment.second), "output"
        ),
        numerics=numerics,
    )


@solves("mlp", size=ComponentRank(), paper=PAPER)
def solve_mlp(
    problem: MLPProblem,
    width: int,
    *,
    select: Literal["score", "obs"] = "score",
    refit: Refit = "least_squares",
) -> Solution:
    """Keep ``width`` hidden neurons and fit the output projection to what they leave out.

    ``score`` keeps the largest (C_ii)^½ ‖W_d[:, i]‖, the published rule; ``obs`` eliminates backwards, each time what
    the refit makes up for best.
    """
    weight, bias, moment = problem.output.weight.double(), problem.output.bias, problem.hidden.double()
    c = moment.second if bias is None else moment.centred
    if select == "obs":
        kept = eliminate_columns(weight, c, width)
    else:
        kept = (c.diagonal().clamp_min(0).sqrt() * weight.norm(dim=0)).topk(width).indices.sort().values
    delta, numerics = weight.clone(), {}
    if refit == "least_squares":
        output, numerics["damping"] = regress_kept(weight, c, kept)
    else:
        output = weight[:, kept]
    delta[:, kept] -= output
    inputs = {
        role: Affine(m.weight[kept], None if m.bias is None else m.bias[kept])
        for role, m in problem.inputs.items()
    }
    if bias is not None:
        bias = bias.double() + delta @ moment.mean
    return Solution(
        parts={**inputs, problem.output_role: Affine(output, bias)},
        predicted=Prediction(data_error(delta, c), data_error(weight, moment.second), "output"),
        neurons=kept,
        numerics=numerics,
    )


def _by_head(matrix: Affine, heads: int) -> tuple[Tensor, Tensor]:
    """Weight (heads, D, n) and bias (heads, D), zero where there is none."""
    weight = matrix.weight.double().unflatten(0, (heads, -1))
    bias = weight.new_zeros(weight.shape[:2]) if matrix.bias is None else matrix.bias.double().view(heads, -1)
    return weight, bias


def _output_moment(weight: Tensor, bias: Tensor, moment: Moment) -> Tensor:
    """E[y yᵀ] (heads, D, D) of y = W x + b, from the moment of x."""
    moment = moment.double()
    cross = (weight @ moment.mean).unsqueeze(-1) * bias.unsqueeze(-2)
    return weight @ moment.second @ weight.mT + cross + cross.mT + bias.unsqueeze(-1) * bias.unsqueeze(-2)


def _score_error(q: Tensor, delta: Tensor | None, k: Tensor) -> float:
    """Σ_heads tr(S_q Δ S_k Δᵀ) = Σ E(qᵀ Δ k)² for independent q and k; Δ = None is the identity."""
    inner = k if delta is None else delta @ k @ delta.mT
    return max(float((q * inner.mT).sum()), 0.0)


def _pair_energy(moment: Tensor) -> Tensor:
    """E‖(y_i, y_{i+D/2})‖² (heads, D/2) from E[y yᵀ]; rotation leaves it as it is."""
    first, second = moment.diagonal(dim1=-2, dim2=-1).clamp_min(0).chunk(2, dim=-1)
    return first + second


def _diagonal_blocks(c: Tensor, blocks: int) -> Tensor:
    """The (blocks, D, D) diagonal blocks of a (blocks·D, blocks·D) matrix."""
    grid = c.unflatten(0, (blocks, -1)).unflatten(2, (blocks, -1))
    return grid.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _mapped(maps: Tensor, matrix: Affine) -> Affine:
    """Every head's rows mapped by its own (rank, D) matrix."""
    weight, bias = _by_head(matrix, maps.shape[0])
    mapped = None if matrix.bias is None else (maps @ bias.unsqueeze(-1)).flatten()
    return Affine((maps @ weight).flatten(0, 1), mapped)
