"""Intervals of figures over windows of text, by resampling whole windows: tokens of one depend on each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lrc.text.blocks import seed_for

RESAMPLES = 1000
TAILS = (0.025, 0.975)
FEW = 30  # windows, below which an interval holds the truth less often than it says
_SEED = 0
_CELLS = 2**24  # of a table of resamples by tokens


@dataclass(frozen=True)
class Estimate:
    """A figure with the ends of its 95 % interval, which are None where there is one window alone."""

    value: float
    low: float | None
    high: float | None


class Bootstrap:
    """How often each of 1,000 resamples, drawn by a fixed seed, holds each of ``windows`` windows.

    All figures of a comparison come from the same resamples, in which a window brings what both models made of it: so
    it is paired. Intervals are percentile intervals (B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993,
    chapter 13): from 2.5 % to 97.5 % of what the resamples give.
    """

    def __init__(self, windows: int) -> None:
        generator = torch.Generator().manual_seed(seed_for(_SEED, "bootstrap"))
        self._counts = torch.zeros(RESAMPLES, windows, dtype=torch.int16)  # there may be many windows
        for row in self._counts:
            drawn = torch.randint(windows, (windows,), generator=generator)
            row.copy_(torch.bincount(drawn, minlength=windows))

    def mean(self, tokens: Tensor) -> Estimate:
        """Mean of (windows, n) over all tokens, summed in float64."""
        sums = tokens.double().sum(dim=1)
        resampled = self._resampled(sums) / tokens.numel()
        return self._estimate(float(sums.sum()) / tokens.numel(), resampled)

    def ratio(self, nats: Tensor, against: Tensor) -> Estimate:
        """Perplexity over perplexity, from nats (windows, n) of the same tokens by two models."""
        difference = nats.double().sum(dim=1) - against.double().sum(dim=1)
        resampled = (self._resampled(difference) / nats.numel()).exp()
        return self._estimate(float((difference.sum() / nats.numel()).exp()), resampled)

    def percentile(self, tokens: Tensor, share: float) -> Estimate:
        """The least of the values (windows, n) that ``share`` of them do not exceed, which is always one of them."""
        size, length = tokens.numel(), tokens.shape[1]
        rank = size - math.ceil(share * size - 1e-9) + 1  # counted from the largest
        ordered, places = tokens.double().flatten().sort(descending=True)
        window, looked_at = places // length, min(8 * rank, size)
        resampled = torch.full((RESAMPLES,), torch.nan, dtype=torch.float64)
        left = torch.arange(RESAMPLES)
        while len(left):  # mostly once: a resample seldom lacks the windows of so many of the largest
            for some in left.split(max(_CELLS // looked_at, 1)):
                # How many of a resample's tokens have come by each, from the largest on down.
                come = self._counts[some][:, window[:looked_at]].cumsum(dim=1)
                reached = (come < rank).sum(dim=1)
                there = reached < looked_at
                resampled[some[there]] = ordered[reached[there]]
                left = left[~torch.isin(left, some[there])]
            looked_at = min(8 * looked_at, size)
        return self._estimate(float(ordered[rank - 1]), resampled)

    def _resampled(self, sums: Tensor) -> Tensor:
        """Sums over every resample of (windows,), which may be infinite or NaN: a window not drawn adds nothing."""
        odd = ~sums.isfinite()
        drawn = torch.where(self._counts[:, odd] > 0, sums[odd], 0.0)
        rows, finite = max(_CELLS // len(sums), 1), sums.masked_fill(odd, 0.0)
        return torch.cat([some.double() @ finite for some in self._counts.split(rows)]) + drawn.sum(dim=1)

    def _estimate(self, value: float, resampled: Tensor) -> Estimate:
        if self._counts.shape[1] < 2:
            return Estimate(value, None, None)
        # An interpolation between two that are infinite would be none.
        low, high = np.quantile(resampled.numpy(), TAILS, method="inverted_cdf")
        return Estimate(value, float(low), float(high))
