"""Collect the moments that give the KL divergence of attention after a change of its scores.

To second order, changing the scores of a query by d_n gives its attention distribution p a KL divergence of
½ Var_{n~p}(d_n). Two moments follow, each per key head and summed over the query heads that share it:

    covariance   E_m Cov_{n~p_m}(k_n), (kv_heads, D, D): used for E[k kᵀ] without rotary positions
    pairs        K[j, j'] = E_m Cov_{n~p_m}(s_j, s_j'), (kv_heads, D/2, D/2), where s_j(m, n) is rotary pair j's share
                 of the scaled score: dropping a set S of pairs costs ½·1_Sᵀ K 1_S nats per query
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lrc.errors import UserError
from lrc.families import Heads, canonical
from lrc.modules.attention import turn
from lrc.moments.observe import Call
from lrc.moments.statistic import Layer, Statistic
from lrc.run.processes import Processes

QUERIES = 16
_SHARE_BYTES = 2**28


@dataclass(frozen=True)
class AttentionMoment:
    """Hold ``covariance`` (kv_heads, D, D) and, with rotary positions, ``pairs`` (kv_heads, D/2, D/2).

    Both are means over ``queries``. ``scale`` multiplies the scores: it is in ``pairs`` but not in ``covariance``.
    """

    covariance: Tensor
    pairs: Tensor | None
    queries: int
    scale: float


class AttentionSum:
    """Running sums for an ``AttentionMoment``, over ``QUERIES`` evenly spaced queries of every sequence."""

    def __init__(self, heads: Heads, scale: float, device: torch.device) -> None:
        self._scale, count, width = scale, heads.kv_heads, heads.head_dim
        self._covariance = torch.zeros(count, width, width, device=device)
        rotary = heads.rotary != "none"
        self._pairs = torch.zeros(count, width // 2, width // 2, device=device) if rotary else None
        self._queries = 0

    def add(self, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        """Add one sequence, with arguments as for ``sampled_attention``."""
        q, k, p = sampled_attention(q, k, mask, self._scale)
        mean = torch.einsum("kgmn,knd->kgmd", p, k)
        weight = p.sum(dim=(1, 2))  # (kv_heads, tokens)
        self._covariance += (k * weight.unsqueeze(-1)).mT @ k - mean.flatten(1, 2).mT @ mean.flatten(1, 2)
        if self._pairs is not None:
            self._add_pairs(self._pairs, q, k, p)
        self._queries += q.shape[2]

    def reduce(self, processes: Processes) -> None:
        """Add the sums of the other processes."""
        processes.sum(self._covariance, *([] if self._pairs is None else [self._pairs]))
        self._queries = processes.total(self._queries)

    def moment(self) -> AttentionMoment:
        """Return the means over queries so far."""
        pairs = None if self._pairs is None else self._pairs / self._queries
        return AttentionMoment(self._covariance / self._queries, pairs, self._queries, self._scale)

    def _add_pairs(self, pairs: Tensor, q: Tensor, k: Tensor, p: Tensor) -> None:
        # Bytes of a key head's shares (group, rows, tokens, D/2).
        each = p[0].numel() * pairs.shape[-1] * 4
        for heads in torch.arange(k.shape[0]).split(max(_SHARE_BYTES // each, 1)):
            part = slice(int(heads[0]), int(heads[-1]) + 1)
            (q1, q2), (k1, k2) = q[part].unsqueeze(-2).chunk(2, dim=-1), k[part, None, None].chunk(2, dim=-1)
            shares = (q1 * k1).addcmul_(q2, k2)
            mean = (p[part].unsqueeze(-2) @ shares).flatten(1, 3)
            weighted = shares.mul_(p[part].sqrt().unsqueeze(-1))
            # One product a query: a single one over all queries is too long and thin to fill a GPU.
            pairs[part] += (weighted.mT @ weighted).sum(dim=(1, 2)) - mean.mT @ mean


class QueryStatistic(Statistic):
    """Feed ``sums`` the queries and keys of the score product, after rotary embedding; all targets share the result."""

    sums: Any  # with ``add``, ``reduce`` and ``moment`` as of ``AttentionSum``

    def __init__(self, layer: Layer, targets: Iterable[str]) -> None:
        super().__init__(layer, targets)
        self._path = layer.architecture.family.attention
        module: Any = layer.module.get_submodule(self._path)
        self.scale: float = module.scaling
        family = layer.architecture.family
        self._turned = family.rotary != "none" and (family.rotates is None or getattr(module, family.rotates))

    @property
    def watched(self) -> Collection[str]:
        return (self._path,)

    def add(self, calls: Mapping[str, Call]) -> None:
        call = calls[self._path]
        x = call.input.to(self.layer.dtype)
        q, k = (self._heads(role, x) for role in ("q", "k"))
        if self._turned:
            cos, sin = (table.unsqueeze(1) for table in call.kwargs["position_embeddings"])
            q, k = turn(q, cos, sin), turn(k, cos, sin)
        mask = call.kwargs.get("attention_mask")
        for block in range(x.shape[0]):
            self.sums.add(q[block], k[block], None if mask is None else mask[min(block, mask.shape[0] - 1)])

    def reduce(self, processes: Processes) -> None:
        self.sums.reduce(processes)

    def result(self) -> dict[str, Any]:
        moment = self.sums.moment()
        if not all(bool(each.isfinite().all()) for each in vars(moment).values() if isinstance(each, Tensor)):
            raise UserError(
                f"layer {self.index}: queries and keys of {self._path}, or their products, are NaN or inf"
            )
        return dict.fromkeys(self.targets, moment)

    def _heads(self, role: str, x: Tensor) -> Tensor:
        """Return queries or keys (blocks, heads, tokens, D), before rotary embedding."""
        architecture = self.layer.architecture
        weight, bias = canonical(architecture.family, architecture, self.layer.state, role)
        bias = None if bias is None else bias.to(x.dtype)
        y = functional.linear(x, weight.to(x.dtype), bias)
        return y.unflatten(-1, (-1, architecture.head_dim)).transpose(1, 2)


class Attention(QueryStatistic):
    """The statistic that solvers read as an ``AttentionMoment``."""

    name = "attention"

    def __init__(self, layer: Layer, targets: Iterable[str]) -> None:
        super().__init__(layer, targets)
        self.sums = AttentionSum(layer.architecture.geometry, self.scale, layer.device)


def sampled_attention(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return some queries of one sequence, scaled, the centred keys, and the attention weights of these queries.

    ``q`` (heads, tokens, D) and ``k`` (kv_heads, tokens, D) are after rotary embedding. ``mask`` is the attention's
    mask (1 or heads, tokens, tokens), boolean or additive; None is causal. The results are (kv_heads, group, n, D),
    (kv_heads, tokens, D) and (kv_heads, group, n, tokens).
    """
    tokens, kv_heads = k.shape[-2], k.shape[0]
    count = min(QUERIES, tokens)
    rows = ((torch.arange(count, device=k.device) + 0.5) * (tokens / count)).long()
    q = q.float()[:, rows].unflatten(0, (kv_heads, -1)) * scale
    k = k.float()
    # Softmax ignores the mean key, which would cancel badly below.
    k = k - k.mean(dim=-2, keepdim=True)
    scores = torch.einsum("kgmd,knd->kgmn", q, k)
    return q, k, _masked(scores, mask, rows).softmax(-1)


def _masked(scores: Tensor, mask: Tensor | None, rows: Tensor) -> Tensor:
    """Return scores (kv_heads, group, rows, tokens) with masked keys at −inf."""
    if mask is None:
        hidden = torch.arange(scores.shape[-1], device=rows.device) > rows.unsqueeze(-1)
        return scores.masked_fill(hidden, -torch.inf)
    seen = mask[:, rows].unflatten(0, (1, -1) if mask.shape[0] == 1 else (scores.shape[0], -1))
    return scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
