"""A3: shrinks the inner dimensions that queries and keys, values and outputs, and the MLP's matrices share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lrc.families import Heads, Matrix
from lrc.maths.alternating import Maps, joint_rows, shared_rows
from lrc.maths.linalg import (
    best_projector,
    column_part,
    eliminate_columns,
    gram_root,
    regress,
    regress_kept,
)
from lrc.methods.contract import (
    Affine,
    MLPProblem,
    OVProblem,
    QKProblem,
    Shapes,
    Solution,
    solves,
)
from lrc.methods.shared.pairs import prediction
from lrc.methods.shared.scores import ScoreMetric, best_map, fitted_map, kept_pairs, loss_gradient
from lrc.methods.sizes import ComponentRank
from lrc.moments.moment import Moment

PAPER = "A3, arXiv:2505.12942"
Refit = Literal["least_squares", "none"]
OutputMetric = Literal["output", "loss"]


def _refuses_qk(heads: Heads, options: Mapping[str, Any]) -> str | None:
    if options.get("metric") == "attention_als" and heads.rotary != "none":
        return "metric attention_als is for positions that do not turn queries and keys; the nearest is attention"
    return None


def _refuses_ov(_: Heads, options: Mapping[str, Any]) -> str | None:
    if options.get("subspace") == "joint" and options.get("refit") == "none":
        return (
            "subspace joint fits the output projection along, which refit none rules out; the nearest is als"
        )
    return None


def _qk_memory(shapes: Shapes, rank: int, options: Mapping[str, Any]) -> int:
    q = shapes.target.matrices["q"]
    return 8 * (2 * q.columns**2 + 3 * q.parameters + 3 * shapes.sampled)


def _ov_memory(shapes: Shapes, rank: int, options: Mapping[str, Any]) -> int:
    """Count the moment, the matrices of the joint fit, and G."""
    v, o = shapes.target.matrices["v"], shapes.target.matrices["o"]
    n, kept = o.columns, shapes.heads.heads * rank
    alternating = 2 * o.rows * (n + kept) + 3 * n * kept if options.get("subspace") == "joint" else 0
    # C, its damped copy and what the regression solves.
    regression = 2 * n**2 + max(n**2, n * kept + 4 * kept**2)
    work = regression + (2 if v.bias or o.bias else 1) * n**2 + 2 * n * kept + 3 * o.parameters
    return 8 * (work + alternating + _metric_work(o, options))


def _mlp_memory(shapes: Shapes, width: int, options: Mapping[str, Any]) -> int:
    """Count the moment, its damped copy and factor, products with the weight, and G."""
    *_, output = shapes.target.matrices.values()
    n = output.columns
    elimination = 3 * n**2 if options.get("select") == "obs" else 0
    # The kept rows and columns of C, their factor and a gathered copy; all of C only a part at a time.
    work = max(elimination, 5 * width**2 // 2, 3 * column_part(n) // 2)
    work = max(3 * n**2, n**2 + work) if output.bias else work
    return 8 * (work + 4 * output.parameters + 2 * output.rows * width + _metric_work(output, options))


def _metric_work(output: Matrix, options: Mapping[str, Any]) -> int:
    """Return the elements of G, its root and its product with the weight."""
    return 4 * output.rows**2 + output.parameters if options.get("metric") == "loss" else 0


@solves(
    "qk",
    size=ComponentRank(),
    option_needs={
        ("metric", "attention"): "attention",
        ("metric", "attention_als"): "attention_samples",
        ("metric", "loss"): "gradients",
    },
    paper=f"{PAPER}; attention and loss metrics: lrc",
    refuses=_refuses_qk,
    rotary="two_sided_svd",
    memory=_qk_memory,
)
def solve_qk(problem: QKProblem, rank: int, *, metric: ScoreMetric = "attention") -> Solution:
    """Reduce every query and key head to ``rank`` dimensions with the least error in the attention scores.

    Without rotary positions, a map P minimises E(qᵀk − qᵀPk)² for independent q and k, summed over the query heads of a
    key head. With them, only whole pairs (i, i + D/2) can be dropped. That costs far more than low-rank q and k, the
    default there, which do not shrink the key cache. Metrics:

    - ``score``, the published rule: E[k kᵀ] for the keys; pairs are ranked by (E‖q_i‖² E‖k_i‖²)^½.
    - ``attention``: the covariance of the keys that a query attends to; pairs are eliminated by the Gram matrix of
      their shares of the score.
    - ``attention_als``, without rotary positions only: as ``attention``, but each sampled query has its own covariance,
      shrunk towards the mean if queries are few.
    - ``loss``: γ = ∂L/∂q replaces k. A change Δ of the map changes the loss by qᵀΔγ to first order; half its mean
      square predicts the rise. Pairs are eliminated by the Gram matrix of q_j·∂L/∂q_j.
    """
    if problem.heads.rotary != "none":
        return kept_pairs(problem, rank, metric)
    if metric == "attention_als":
        return fitted_map(problem, rank)
    return best_map(problem, rank, metric)


@solves(
    "ov",
    size=ComponentRank(),
    option_needs={("metric", "loss"): "gradients"},
    paper=f"{PAPER}; loss metric, als and joint subspaces: lrc",
    refuses=_refuses_ov,
    memory=_ov_memory,
)
def solve_ov(
    problem: OVProblem,
    rank: int,
    *,
    metric: OutputMetric = "loss",
    subspace: Literal["stacked", "als", "joint"] = "als",
    refit: Refit = "least_squares",
) -> Solution:
    """Reduce every value head to ``rank`` dimensions by a map T (rank, D), and the output projection to match.

    The metric G is the identity (``output``) or E[g gᵀ] of the loss's gradient g at the output (``loss``). Subspaces of
    T, each at least as good in its own error as its start:

    - ``stacked``: top directions of G^½ O_h S̄^½, stacked over the query heads h of the value head, S̄ being their mean
      moment; optimal for one query head per value head.
    - ``als``: starts there and lowers the summed error of query heads, each with its own moment and readout of T.
    - ``joint``: starts from the better of the two and lowers the error of the whole output, with ``o`` fitted to T.

    ``least_squares`` then fits ``o`` to all heads jointly, as their errors are correlated. ``none``, the published
    rule, takes each head alone. The value bias folds into the output bias: attention rows sum to one.
    """
    heads, group, weight = problem.heads, problem.heads.group, problem.o.weight.double()
    moment, biased = problem.output.double(), _biased(problem)
    free, c = attention_output(problem)
    readers = weight.unflatten(1, (heads.heads, -1)).transpose(0, 1)  # (heads, hidden, D)
    p, numerics = _value_rows(problem, rank, c, metric, subspace)
    reduce = torch.block_diag(*p.down.repeat_interleave(group, dim=0))  # (heads·rank, heads·D)
    if refit == "least_squares":
        output, numerics["refit_damping"] = regress(weight, c, reduce)
    else:
        output = (readers @ p.up).transpose(0, 1).flatten(1)
    bias = None
    if biased:
        bias = weight @ moment.mean - output @ (reduce @ free.mean)
        bias = bias if problem.o.bias is None else bias + problem.o.bias.double()
    values = problem.v.weight.double().unflatten(0, (heads.kv_heads, -1))
    return Solution(
        parts={"v": Affine((p.down @ values).flatten(0, 1)), "o": Affine(output, bias)},
        predicted=prediction(weight, moment, weight - output @ reduce, c, problem.gradient),
        numerics=numerics,
    )


def attention_output(problem: OVProblem) -> tuple[Moment, Tensor]:
    """Return the float64 moment of the output projection's input without the value bias, and the matrix C of errors.

    C is centred if a bias can correct the mean.
    """
    moment, bias = problem.output.double(), problem.v.bias
    if bias is not None:
        heads = problem.heads
        offset = bias.double().unflatten(0, (heads.kv_heads, -1)).repeat_interleave(heads.group, dim=0)
        moment = moment.shifted(offset.flatten())
    return moment, moment.centred if _biased(problem) else moment.second


def _biased(problem: OVProblem) -> bool:
    return problem.v.bias is not None or problem.o.bias is not None


def _value_rows(
    problem: OVProblem, rank: int, c: Tensor, metric: OutputMetric, subspace: str
) -> tuple[Maps, dict[str, float]]:
    """Return U (heads, D, rank) and T (kv_heads, rank, D) for C of the attention output, and the numerics."""
    heads, weight, numerics = problem.heads, problem.o.weight.double(), {}
    if metric == "loss":
        root, numerics["gradient_damping"] = gram_root(loss_gradient(problem))
        weight = root @ weight
    readers = weight.unflatten(1, (heads.heads, -1)).transpose(0, 1)
    grams = (readers.mT @ readers).unflatten(0, (-1, heads.group))
    own = diagonal_blocks(c, heads.heads).unflatten(0, (-1, heads.group))
    p = best_projector(own.mean(dim=1), grams.sum(dim=1), rank)
    numerics["damping"] = p.damping
    stacked = Maps(p.up.repeat_interleave(heads.group, dim=0), p.down)
    best = subspace == "als" and heads.group == 1
    if subspace == "stacked" or best or rank == heads.head_dim:
        return stacked, numerics
    maps, numerics["rounds"] = shared_rows(own, grams, p.down)
    numerics["rounds_damping"] = maps.damping
    if subspace == "als":
        return Maps(maps.up.flatten(0, 1), maps.down), numerics
    joint, numerics["joint_rounds"] = joint_rows(weight, c, p.down, maps.down)
    numerics["joint_rounds_damping"] = joint.damping
    return Maps(stacked.up, joint.down), numerics


@solves(
    "mlp",
    size=ComponentRank(),
    option_needs={("metric", "loss"): "gradients"},
    paper=f"{PAPER}; obs: optimal brain surgeon, Hassibi and Stork 1993, for neurons",
    memory=_mlp_memory,
)
def solve_mlp(
    problem: MLPProblem,
    width: int,
    *,
    metric: OutputMetric = "loss",
    select: Literal["score", "obs"] = "score",
    refit: Refit = "least_squares",
) -> Solution:
    """Keep ``width`` hidden neurons and fit the output projection to make up for the others.

    The metric G is as for ``solve_ov``; the fit is the same for every G. ``score`` keeps the largest
    (C_ii)^½ ‖G^½ W_d[:, i]‖, the published rule if G is the identity. ``obs`` eliminates the neurons that a refit
    replaces best in that metric, which fits the calibration text more closely and other text less.
    """
    weight, bias, moment = problem.output.weight.double(), problem.output.bias, problem.hidden
    c = moment.second if bias is None else moment.double().centred
    read, numerics = weight, {}
    if metric == "loss":
        root, numerics["gradient_damping"] = gram_root(loss_gradient(problem))
        read = root @ weight
    if select == "obs":
        kept, numerics["elimination_damping"] = eliminate_columns(read, c, width)
    else:
        kept = (
            (c.diagonal().double().clamp_min(0).sqrt() * read.norm(dim=0)).topk(width).indices.sort().values
        )
    delta = weight.clone()
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
        bias = bias.double() + delta @ moment.mean.double()
    return Solution(
        parts={**inputs, problem.output_role: Affine(output, bias)},
        predicted=prediction(weight, moment, delta, c, problem.gradient),
        numerics=numerics,
    )


def diagonal_blocks(c: Tensor, blocks: int) -> Tensor:
    """Return the (blocks, D, D) diagonal blocks of a (blocks·D, blocks·D) matrix."""
    grid = c.unflatten(0, (blocks, -1)).unflatten(2, (blocks, -1))
    return grid.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
