"""What a change of the scores costs attention: softmax ignores what is equal for all keys.

To second order, changing the scores of a query m by d_n raises the KL divergence of its attention distribution p to
½ Var_{n~p}(d_n). Two statistics follow, each per key head and summed over the query heads that share it:

    covariance   E_m Cov_{n~p_m}(k_n), (kv_heads, D, D): what takes the place of E[k kᵀ] where positions are not rotary
    pairs        K[j, j'] = E_m Cov_{n~p_m}(s_j, s_j'), (kv_heads, D/2, D/2), s_j(m, n) being rotary pair j's share of
                 the scaled score: dropping the set of pairs D costs ½·1_Dᵀ K 1_D nats for every query

Where asked for, some queries are kept as they are, each with its own covariance: the mean of q_m q_mᵀ ⊗ Cov_m.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.run.processes import ALONE, Ranks

QUERIES = 16
SAMPLES = 1024  # queries kept of a key head
_SHARE_BYTES = 2**28


@dataclass(frozen=True)
class AttentionSamples:
    """Scaled queries ``q`` (kv_heads, group, n, D) and, of each, Cov_{n~p}(k_n) (kv_heads, group, n, D, D)."""

    q: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class AttentionMoment:
    """``covariance`` (kv_heads, D, D), ``pairs`` (kv_heads, D/2, D/2) with rotary positions, of ``queries`` queries.

    ``scale`` multiplies the scores; the covariance is of the keys as they are, the pairs' shares are scaled. At most
    ``SAMPLES`` of the queries of every key head, evenly taken, are in ``samples``.
    """

    covariance: Tensor
    pairs: Tensor | None
    queries: int
    scale: float
    samples: AttentionSamples | None = None


class AttentionSum:
    """Sums over ``QUERIES`` queries of every sequence, evenly spaced: a few dozen are enough.

    Sequences are those that are ``mine`` by ``ranks``, in order, so that all processes keep the queries that one would.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        scale: float,
        rotary: bool,
        device: torch.device,
        *,
        samples: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self._scale, self._ranks = scale, ranks
        self._covariance = torch.zeros(kv_heads, head_dim, head_dim, device=device)
        self._pairs = torch.zeros(kv_heads, head_dim // 2, head_dim // 2, device=device) if rotary else None
        self._queries = 0
        # By the number of the sequence among those of all processes.
        self._samples: dict[int, AttentionSamples] | None = {} if samples else None
        self._number, self._stride = ranks.rank, 1

    def add(self, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        """Count one sequence: q (heads, tokens, D) and k (kv_heads, tokens, D) as they enter the product, turned.

        ``mask`` is what the model hands its attention for this sequence, (1 or heads, tokens, tokens), boolean or
        added to the scores; None is causal.
        """
        tokens, kv_heads = k.shape[-2], k.shape[0]
        count = min(QUERIES, tokens)
        rows = ((torch.arange(count, device=k.device) + 0.5) * (tokens / count)).long()
        q = q.float()[:, rows].unflatten(0, (kv_heads, -1)) * self._scale  # (kv_heads, group, rows, D)
        k = k.float()
        k = k - k.mean(
            dim=-2, keepdim=True
        )  # equal for all keys: it changes nothing, and would cancel badly below
        scores = torch.einsum("kgmd,knd->kgmn", q, k)
        p = _masked(scores, mask, rows).softmax(-1)
        mean = torch.einsum("kgmn,knd->kgmd", p, k)
        weight = p.sum(dim=(1, 2))  # (kv_heads, tokens)
        self._covariance += (k * weight.unsqueeze(-1)).mT @ k - mean.flatten(1, 2).mT @ mean.flatten(1, 2)
        if self._pairs is not None:
            self._add_pairs(q, k, p)
        if self._samples is not None:
            self._add_samples(self._samples, q, k, p)
        self._queries += len(rows)

    def reduce(self) -> None:
        """Add what the other processes have counted."""
        ranks = self._ranks
        ranks.sum(self._covariance, *([] if self._pairs is None else [self._pairs]))
        self._queries = ranks.total(self._queries)
        if self._samples is not None:
            self._stride = max(ranks.gather(self._stride))
            gathered = {n: kept for each in ranks.gather(self._samples) for n, kept in each.items()}
            every = {n: gathered[n] for n in sorted(gathered) if n % self._stride == 0}
            self._samples = self._thin(every)

    def moment(self) -> AttentionMoment:
        """The means over queries so far."""
        pairs = None if self._pairs is None else self._pairs / self._queries
        samples = None
        if self._samples is not None:
            samples = AttentionSamples(
                torch.cat([kept.q for kept in self._samples.values()], dim=2),
                torch.cat([kept.covariance for kept in self._samples.values()], dim=2),
            )
        return AttentionMoment(self._covariance / self._queries, pairs, self._queries, self._scale, samples)

    def _add_samples(self, samples: dict[int, AttentionSamples], q: Tensor, k: Tensor, p: Tensor) -> None:
        """Keep the queries of every ``stride``-th sequence."""
        if self._number % self._stride == 0:
            covariances = []
            # one key head at a time: keys weighted by every query are large
            for keys, weights in zip(k, p, strict=True):
                centred = keys - (weights @ keys).unsqueeze(-2)  # (group, rows, tokens, D)
                covariances.append((centred * weights.unsqueeze(-1)).mT @ centred)
            samples[self._number] = AttentionSamples(q, torch.stack(covariances))
        self._number += self._ranks.size
        self._samples = self._thin(samples)

    def _thin(self, samples: dict[int, AttentionSamples]) -> dict[int, AttentionSamples]:
        """Double the stride until there are not too many."""
        while len(samples) > 1 and sum(kept.q[0, ..., 0].numel() for kept in samples.values()) > SAMPLES:
            self._stride *= 2
            samples = {number: kept for number, kept in samples.items() if number % self._stride == 0}
        return samples

    def _add_pairs(self, q: Tensor, k: Tensor, p: Tensor) -> None:
        assert self._pairs is not None
        each = (
            p[0].numel() * self._pairs.shape[-1] * 4
        )  # bytes of the shares (group, rows, tokens, D/2) of a key head
        for heads in torch.arange(k.shape[0]).split(max(_SHARE_BYTES // each, 1)):
            part = slice(int(heads[0]), int(heads[-1]) + 1)
            (q1, q2), (k1, k2) = q[part].unsqueeze(-2).chunk(2, dim=-1), k[part, None, None].chunk(2, dim=-1)
            shares = (q1 * k1).addcmul_(q2, k2)
            mean = (p[part].unsqueeze(-2) @ shares).flatten(1, 3)
            weighted = shares.mul_(p[part].sqrt().unsqueeze(-1))
            # a product for each query, as one over all of them is too long and thin to fill a GPU
            self._pairs[part] += (weighted.mT @ weighted).sum(dim=(1, 2)) - mean.mT @ mean


def _masked(scores: Tensor, mask: Tensor | None, rows: Tensor) -> Tensor:
    """Scores (kv_heads, group, rows, tokens) with the keys that a query does not see at −inf."""
    if mask is None:
        hidden = torch.arange(scores.shape[-1], device=rows.device) > rows.unsqueeze(-1)
        return scores.masked_fill(hidden, -torch.inf)
    seen = mask[:, rows].unflatten(0, (1, -1) if mask.shape[0] == 1 else (scores.shape[0], -1))
    return scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
