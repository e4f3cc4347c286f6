"""Intervals of figures over windows of text, by resampling whole windows: tokens of one depend on each other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

RESAMPLES = 1000
TAILS = (0.025, 0.975)
FEW = 30  # windows, below which an interval holds the truth less often than it says
_SEED = 0
_CELLS = 2**22  # of a table of resamples by windows


@dataclass(frozen=True)
class Estimate:
    """A figure with the ends of its 95 % interval, which are None where there is one window alone."""

    value: float
    low: float | None
    high: float | None


def mean(tokens: Tensor) -> Estimate:
    """Return the mean of (windows, n) over all tokens, summed in float64."""
    return _means(tokens, lambda means: means)


def ratio(nats: Tensor, against: Tensor) -> Estimate:
    """Return perplexity over perplexity, from nats (windows, n) of the same tokens by two models."""
    return _means(nats.double() - against.double(), np.exp)


def percentile(tokens: Tensor, share: float) -> Estimate:
    """Return the least of the values (windows, n) that ``share`` of them do not exceed, which is always one of them."""
    size, length = tokens.numel(), tokens.shape[1]
    rank = size - math.ceil(share * size - 1e-9) + 1  # counted from the largest
    ordered, places = (each.numpy() for each in tokens.double().flatten().sort(descending=True))
    window = places // length

    def figure(drawn: np.ndarray) -> float:
        counts = np.bincount(drawn, minlength=len(tokens))
        for looked_at in (8 * rank, size):  # a resample seldom lacks the windows of so many of the largest
            come = counts[window[:looked_at]].cumsum()
            if come[-1] >= rank:
                return ordered[np.searchsorted(come, rank)]
        raise AssertionError("a resample has as many tokens as the text")

    return _estimate(len(tokens), lambda drawn: np.apply_along_axis(figure, -1, drawn))


def _means(tokens: Tensor, figure: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    sums, size = tokens.double().sum(dim=1).numpy(), tokens.numel()
    return _estimate(len(sums), lambda drawn: figure(sums[drawn].sum(axis=-1) / size))


def _estimate(windows: int, figure: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """Estimate a figure of windows drawn (resamples, windows), by 1,000 resamples of a fixed seed.

    All figures of a comparison come from the same resamples, in which a window brings what both models made of it: so
    it is paired. Intervals are percentile intervals (B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993,
    chapter 13): from 2.5 % to 97.5 % of what the resamples give.
    """
    from scipy.stats import bootstrap  # takes a second to import

    every = np.arange(windows)
    value = float(figure(every[None])[0])
    if windows < 2:
        return Estimate(value, None, None)
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore")  # of scipy's own interval, which is none where a figure is infinite
        found = bootstrap(
            (every,),
            lambda drawn, axis: figure(drawn),
            n_resamples=RESAMPLES,
            batch=max(_CELLS // windows, 1),
            method="percentile",
            rng=np.random.default_rng(_SEED),
        )
    # An interpolation between two that are infinite would be none.
    low, high = np.quantile(found.bootstrap_distribution, TAILS, method="inverted_cdf")
    return Estimate(value, float(low), float(high))
