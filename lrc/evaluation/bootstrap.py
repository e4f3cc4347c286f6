"""Compute bootstrap intervals by resampling whole windows of text, whose tokens depend on each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

RESAMPLES = 1000
TAILS = (0.025, 0.975)
FEW = 30  # windows, below which an interval covers the true value less often than 95 %
_SEED = 0
_CELLS = 2**22  # of the array (resamples, windows) drawn at once


@dataclass(frozen=True)
class Estimate:
    """Hold a figure and the ends of its 95 % interval, None if there is only one window."""

    value: float
    low: float | None
    high: float | None

    def between(self, form: Callable[[float], str]) -> str:
        """Return the interval in words, such as 1.2 to 1.3; an empty string if there is none."""
        return "" if self.low is None or self.high is None else f"{form(self.low)} to {form(self.high)}"


def few(windows: int) -> str:
    """Return the number of windows in words where they are too few for a sure interval, else an empty string."""
    return f"{windows} window{'s' * (windows != 1)} only" if windows < FEW else ""


def caveat(windows: int) -> str | None:
    """Say why the intervals of a figure of few windows are missing or unsure; None if they are sure."""
    if windows < 2:
        return "one window is measured, so the figures have no interval"
    if windows < FEW:
        return f"{windows} windows are few; below {FEW} the intervals cover the true value less often than stated"
    return None


def mean(tokens: Tensor) -> Estimate:
    """Return the mean of (windows, n) over all tokens, summed in float64."""
    sums, size = tokens.double().sum(dim=1).numpy(), tokens.numel()
    return _estimate(len(sums), lambda drawn: sums[drawn].sum(axis=-1) / size)


def ratio(nats: Tensor, against: Tensor) -> Estimate:
    """Return perplexity over perplexity, from nats (windows, n) of the same tokens by two models."""
    found = mean(nats.double() - against.double())
    low, high = (end if end is None else float(np.exp(end)) for end in (found.low, found.high))
    return Estimate(float(np.exp(found.value)), low, high)


def percentile(tokens: Tensor, share: float) -> Estimate:
    """Return the smallest of the values (windows, n) that at least ``share`` of the values do not exceed."""
    size, length = tokens.numel(), tokens.shape[1]
    rank = size - math.ceil(share * size - 1e-9) + 1  # counted from the largest
    ordered, places = (each.numpy() for each in tokens.double().flatten().sort(descending=True))
    window = places // length

    def figure(drawn: np.ndarray) -> float:
        counts = np.bincount(drawn, minlength=len(tokens))
        found = counts[window[: 8 * rank]].cumsum()  # nearly always enough of the largest
        if found[-1] < rank:
            found = counts[window].cumsum()
        return ordered[np.searchsorted(found, rank)]

    return _estimate(len(tokens), lambda drawn: np.apply_along_axis(figure, -1, drawn))


def _estimate(windows: int, figure: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """Estimate a figure, a function of drawn windows (resamples, windows), with its percentile interval.

    The seed is fixed, so all figures of a comparison use the same resamples, and two models are compared in pairs.
    B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    value = float(figure(np.arange(windows)[None])[0])
    if windows < 2:
        return Estimate(value, None, None)
    rng, batch, found = np.random.default_rng(_SEED), max(_CELLS // windows, 1), []
    with np.errstate(invalid="ignore"):  # a figure may be infinite
        for start in range(0, RESAMPLES, batch):
            found.append(figure(rng.integers(windows, size=(min(batch, RESAMPLES - start), windows))))
    # Interpolation between two infinite values would give NaN.
    low, high = np.quantile(np.concatenate(found), TAILS, method="inverted_cdf")
    return Estimate(value, float(low), float(high))
