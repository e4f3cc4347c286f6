"""Intervals against resamples made by hand, and against what is known of the mean of normal numbers."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch

from lrc.evaluation import bootstrap as module
from lrc.evaluation.bootstrap import caveat, few, mean, percentile, ratio


def resamples(windows: int) -> list[torch.Tensor]:
    """The windows of every resample, as all figures get them; of the first call the windows as they are."""
    drawn: list[np.ndarray] = []

    def figure(some: np.ndarray) -> np.ndarray:
        drawn.extend(some)
        return np.zeros(len(some))

    module._estimate(windows, figure)
    # scipy may ask for the figure of the windows as they are too.
    return [torch.from_numpy(each) for each in drawn if not np.array_equal(each, np.arange(windows))]


def by_hand(figure, windows: int) -> list[float]:
    return np.quantile(
        [figure(drawn) for drawn in resamples(windows)], [0.025, 0.975], method="inverted_cdf"
    ).tolist()


def nearest_rank(values: torch.Tensor, share: float) -> float:
    ordered = values.flatten().double().sort().values
    return float(ordered[math.ceil(share * len(ordered)) - 1])


@pytest.mark.parametrize("cells", [2**24, 50])
@pytest.mark.parametrize("share", [0.99, 0.9, 0.5])
def test_percentiles_are_those_of_resamples_written_out(share, cells, monkeypatch):
    monkeypatch.setattr(module, "_CELLS", cells)
    values = torch.rand(7, 15, generator=torch.Generator().manual_seed(0)) ** 4
    values[3] += 1  # all of the largest are in one window, which many a resample lacks
    found = percentile(values, share)
    assert found.value == nearest_rank(values, share)
    assert [found.low, found.high] == by_hand(lambda drawn: nearest_rank(values[drawn], share), 7)


def test_ratios_and_means_are_too():
    ours, theirs = torch.rand(2, 6, 9, generator=torch.Generator().manual_seed(0))
    found = ratio(ours, theirs)
    assert found.value == pytest.approx(math.exp(float(ours.double().mean() - theirs.double().mean())))
    expected = by_hand(
        lambda drawn: math.exp(float(ours[drawn].double().mean() - theirs[drawn].double().mean())), 6
    )
    assert [found.low, found.high] == pytest.approx(expected)
    assert mean(ours).value == pytest.approx(float(ours.double().mean()))


def test_a_resample_has_as_many_windows_as_there_are_and_comes_again():
    drawn = torch.stack(resamples(20))
    assert drawn.shape == (1000, 20)
    assert torch.equal(drawn, torch.stack(resamples(20)))
    assert torch.bincount(drawn.flatten()).div(1000).sub(1).abs().max() < 0.15


def test_intervals_have_the_width_that_the_spread_of_windows_gives():
    values = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)).expand(400, 50)
    found = mean(values)
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.1)


def test_pairs_cancel_what_both_models_find_hard():
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(50, 1, generator=generator) * 5
    theirs = hard + torch.rand(50, 30, generator=generator) / 10
    found = ratio(theirs + 0.1, theirs)
    assert found.low == pytest.approx(math.exp(0.1), rel=1e-3)
    assert found.high == pytest.approx(math.exp(0.1), rel=1e-3)


def test_one_window_has_no_interval_and_what_is_infinite_stays_so():
    assert mean(torch.rand(1, 9)).low is None
    found = mean(torch.full((5, 3), torch.inf))
    assert (found.value, found.low, found.high) == (math.inf, math.inf, math.inf)


def test_memory_grows_with_the_text_and_not_with_resamples_by_windows():
    values = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0))
    tracemalloc.start()
    try:
        mean(values)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**28  # a table of 1,000 resamples by windows alone has 2**27 bytes


def test_few_windows_stand_beside_a_figure() -> None:
    assert [few(n) for n in (1, 2, 29, 30, 148)] == [
        "1 window only",
        "2 windows only",
        "29 windows only",
        "",
        "",
    ]


def test_a_caveat_names_the_windows_where_an_interval_is_missing_or_unsure() -> None:
    assert "no interval" in str(caveat(1))
    assert "29 windows are few" in str(caveat(29))
    assert caveat(30) is None


def test_one_window_has_no_interval_and_infinite_figures_have_one() -> None:
    values = torch.tensor([[1.0, 3.0], [5.0, math.inf]])
    one, two = mean(values[:1]), mean(values)
    assert (one.value, one.low, one.high, one.between(str)) == (2.0, None, None, "")
    assert (two.value, two.low, two.high, two.between(str)) == (math.inf, 2.0, math.inf, "2.0 to inf")
