"""Sample queries q_m, each with the covariance Cov_m of the keys it attends to, for the mean of q_m q_mᵀ ⊗ Cov_m."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.moments.attention import QueryStatistic, sampled_attention
from lrc.moments.statistic import Layer
from lrc.run.processes import ALONE, Processes

SAMPLES = 1024  # queries per key head


@dataclass(frozen=True)
class AttentionSamples:
    """Scaled queries ``q`` (kv_heads, group, n, D) and their Cov_{n~p}(k_n) (kv_heads, group, n, D, D)."""

    q: Tensor
    covariance: Tensor


class SampleSum:
    """Collect at most ``SAMPLES`` queries per key head, evenly spaced over the sequences of all processes.

    The samples do not depend on the number of processes.
    """

    def __init__(self, scale: float, processes: Processes = ALONE) -> None:
        self._scale = scale
        # By number of the sequence, counted over all processes.
        self._kept: dict[int, AttentionSamples] = {}
        self._number, self._step, self._stride = processes.rank, processes.size, 1

    def add(self, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        """Add one sequence, with arguments as for ``sampled_attention``; every ``stride``-th is kept."""
        if self._number % self._stride == 0:
            q, k, p = sampled_attention(q, k, mask, self._scale)
            covariances = []
            # One key head at a time: keys weighted by every query are large.
            for keys, weights in zip(k, p, strict=True):
                centred = keys - (weights @ keys).unsqueeze(-2)  # (group, rows, tokens, D)
                covariances.append((centred * weights.unsqueeze(-1)).mT @ centred)
            self._kept[self._number] = AttentionSamples(q, torch.stack(covariances))
        self._number += self._step
        self._thin()

    def reduce(self, processes: Processes) -> None:
        """Add the samples of the other processes."""
        self._stride = max(processes.gather(self._stride))
        gathered = {n: kept for each in processes.gather(self._kept) for n, kept in each.items()}
        self._kept = {n: gathered[n] for n in sorted(gathered) if n % self._stride == 0}
        self._thin()

    def moment(self) -> AttentionSamples:
        """Return the samples, in the order of the sequences."""
        return AttentionSamples(
            torch.cat([kept.q for kept in self._kept.values()], dim=2),
            torch.cat([kept.covariance for kept in self._kept.values()], dim=2),
        )

    def _thin(self) -> None:
        """Double the stride until at most ``SAMPLES`` queries are left."""
        while len(self._kept) > 1 and sum(k.q[0, ..., 0].numel() for k in self._kept.values()) > SAMPLES:
            self._stride *= 2
            self._kept = {n: kept for n, kept in self._kept.items() if n % self._stride == 0}


class Samples(QueryStatistic):
    """The statistic that solvers read as ``AttentionSamples``."""

    name = "attention_samples"

    def __init__(self, layer: Layer, targets: Iterable[str]) -> None:
        super().__init__(layer, targets)
        self.sums = SampleSum(self.scale, layer.processes)
