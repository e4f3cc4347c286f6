"""Intervals against resamples made by hand, and against what is known of the mean of normal numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lrc.evaluation import bootstrap as module
from lrc.evaluation.bootstrap import Bootstrap


def by_hand(bootstrap: Bootstrap, figure, windows: int) -> list[float]:
    """The figure of every resample, whose windows are written out as often as they come."""
    counts = bootstrap._counts.int()
    return [figure(torch.arange(windows).repeat_interleave(row)) for row in counts]


def nearest_rank(values: torch.Tensor, share: float) -> float:
    ordered = values.flatten().double().sort().values
    return float(ordered[math.ceil(share * len(ordered)) - 1])


@pytest.mark.parametrize("cells", [2**24, 50])
@pytest.mark.parametrize("share", [0.99, 0.9, 0.5])
def test_percentiles_are_those_of_resamples_written_out(share, cells, monkeypatch):
    monkeypatch.setattr(module, "_CELLS", cells)
    values = torch.rand(7, 15, generator=torch.Generator().manual_seed(0)) ** 4
    values[3] += 1  # all of the largest are in one window, which many a resample lacks
    bootstrap = Bootstrap(7)
    found = bootstrap.percentile(values, share)
    assert found.value == nearest_rank(values, share)
    resampled = by_hand(bootstrap, lambda drawn: nearest_rank(values[drawn], share), 7)
    low, high = np.quantile(resampled, [0.025, 0.975], method="inverted_cdf")
    assert (found.low, found.high) == (low, high)


def test_ratios_and_means_are_too():
    ours, theirs = torch.rand(2, 6, 9, generator=torch.Generator().manual_seed(0))
    bootstrap = Bootstrap(6)
    found = bootstrap.ratio(ours, theirs)
    assert found.value == pytest.approx(math.exp(float(ours.double().mean() - theirs.double().mean())))
    resampled = by_hand(
        bootstrap,
        lambda drawn: math.exp(float(ours[drawn].double().mean() - theirs[drawn].double().mean())),
        6,
    )
    low, high = np.quantile(resampled, [0.025, 0.975], method="inverted_cdf")
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert bootstrap.mean(ours).value == pytest.approx(float(ours.double().mean()))


def test_a_resample_has_as_many_windows_as_there_are_and_comes_again():
    counts = Bootstrap(20)._counts.double()
    assert (counts.sum(dim=1) == 20).all()
    assert counts.shape == (1000, 20)
    assert torch.equal(counts, Bootstrap(20)._counts.double())
    assert counts.mean(dim=0).sub(1).abs().max() < 0.15


def test_intervals_have_the_width_that_the_spread_of_windows_gives():
    values = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)).expand(400, 50)
    found = Bootstrap(400).mean(values)
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.1)


def test_pairs_cancel_what_both_models_find_hard():
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(50, 1, generator=generator) * 5
    theirs = hard + torch.rand(50, 30, generator=generator) / 10
    found = Bootstrap(50).ratio(theirs + 0.1, theirs)
    assert found.low == pytest.approx(math.exp(0.1), rel=1e-3)
    assert found.high == pytest.approx(math.exp(0.1), rel=1e-3)


def test_one_window_has_no_interval_and_what_is_infinite_stays_so():
    assert Bootstrap(1).mean(torch.rand(1, 9)).low is None
    found = Bootstrap(5).mean(torch.full((5, 3), torch.inf))
    assert (found.value, found.low, found.high) == (math.inf, math.inf, math.inf)
