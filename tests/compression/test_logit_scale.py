"""The scale of the logits against a search on the distributions themselves, and what a run makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lrc.compression import logit_scale
from lrc.compression.logit_scale import LEAST, MOST, SPREAD, Final, LogitScale, fit_channels, fit_scale
from lrc.errors import UserError


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HEAD = normal(50, 8, seed=0)


def logits(hidden: Tensor, factors: Tensor | None = None) -> Tensor:
    return (hidden if factors is None else hidden * factors) @ HEAD.to(hidden.dtype).T


def divergence(original: Tensor, compressed: Tensor, by: float) -> float:
    """KL(p‖q) by torch's own function, in float64."""
    p, q = (
        (f * logits(h).double()).log_softmax(-1).flatten(0, -2)
        for f, h in ((1.0, original), (by, compressed))
    )
    return float(functional.kl_div(q, p, log_target=True, reduction="batchmean"))


def fit(original: Tensor, compressed: Tensor, size: int = 2) -> LogitScale:
    before, after = (Final(states.split(size), logits) for states in (original, compressed))
    return fit_scale(before, after, len(HEAD))


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.5])
def test_no_other_scale_is_nearer_to_the_original(noise: float) -> None:
    original = normal(5, 20, 8, seed=1)
    compressed = original + noise * normal(5, 20, 8, seed=2)
    found = fit(original, compressed)
    assert found.value < 1
    assert found.tokens == 100
    assert found.before == pytest.approx(divergence(original, compressed, 1.0), rel=1e-4)
    assert found.after == pytest.approx(divergence(original, compressed, found.value), rel=1e-4)
    grid = torch.linspace(LEAST, 2, 1000).tolist()
    best = min(grid, key=lambda by: divergence(original, compressed, by))
    assert found.value == pytest.approx(best, abs=grid[1] - grid[0])


@pytest.mark.parametrize("by", [0.3, 1.0, 4.0])
def test_a_factor_alone_is_undone(by: float) -> None:
    original = normal(3, 20, 8, seed=1)
    found = fit(original, original / by)
    assert found.value == pytest.approx(by, rel=1e-3)
    assert found.after == pytest.approx(0, abs=1e-5)


def test_each_has_logits_of_its_own() -> None:
    """States that are the same, with heads that differ by a factor."""
    states = normal(3, 20, 8, seed=1).split(2)
    halved = Final(states, lambda hidden, factors=None: logits(hidden, factors) / 2)
    found = fit_scale(Final(states, logits), halved, len(HEAD))
    assert found.value == pytest.approx(2, rel=1e-3)
    assert found.after == pytest.approx(0, abs=1e-5)


def test_it_stays_between_its_bounds() -> None:
    """Logits against the original's, and ones that are a hundredth of them."""
    original = normal(3, 20, 8, seed=1)
    assert fit(original, -original).value == pytest.approx(LEAST, rel=1e-3)
    assert fit(original, original / 100).value == pytest.approx(MOST, rel=1e-3)


def test_logits_that_are_all_alike_end() -> None:
    original = normal(3, 20, 8, seed=1)
    found = fit(original, torch.zeros_like(original))
    assert found.after == pytest.approx(found.before)


def test_neither_batches_nor_chunks_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    original = normal(5, 20, 8, seed=1)
    compressed = original + normal(5, 20, 8, seed=2)
    expected = fit(original, compressed)
    seen: list[int] = []

    def watched(hidden: Tensor, factors: Tensor | None = None) -> Tensor:
        seen.append(len(hidden))
        return logits(hidden, factors)

    monkeypatch.setattr(logit_scale, "CHUNK_BYTES", 4 * len(HEAD) * 7)
    before, after = (Final(states.split(3), watched) for states in (original, compressed))
    found = fit_scale(before, after, len(HEAD))
    assert max(seen) == 7
    assert found.value == pytest.approx(expected.value, rel=1e-5)
    assert (found.before, found.after) == pytest.approx((expected.before, expected.after), rel=1e-5)


@pytest.mark.parametrize(
    ("value", "told"), [(LEAST, True), (MOST * 0.999, True), (0.97, False), (5.0, False)]
)
def test_a_scale_at_its_limit_is_told(value: float, told: bool) -> None:
    warnings = LogitScale(value, 2.0, 1.0, 8).warnings
    assert len(warnings) == told
    assert all("the logit scale ends at its limit" in warning for warning in warnings)


def test_logits_that_are_no_numbers_are_refused() -> None:
    states = normal(2, 3, 8, seed=1)
    with pytest.raises(UserError, match="NaN or inf"):
        fit(states, states / 0)


def channels(original: Tensor, compressed: Tensor) -> tuple[Tensor, LogitScale]:
    before, after = (Final(states.split(2), logits) for states in (original, compressed))
    return fit_channels(before, after, fit_scale(before, after, len(HEAD)), 8, len(HEAD))


def test_factors_of_channels_are_undone_but_for_the_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_scale, "SPREAD", 100)
    monkeypatch.setattr(logit_scale, "_CHANNEL_STEPS", 1000)
    original, by = normal(5, 200, 8, seed=1), torch.linspace(0.7, 1.3, 8)
    factors, found = channels(original, original / by)
    torch.testing.assert_close(factors, by.double(), rtol=5e-3, atol=0)
    assert found.channels == (float(factors.min()), float(factors.max()))
    assert found.after < 1e-4 < fit(original, original / by).after


def test_factors_minimise_the_divergence_and_the_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_scale, "_CHANNEL_STEPS", 1000)
    original = normal(5, 20, 8, seed=1)
    compressed = original + 0.5 * normal(5, 20, 8, seed=2)
    factors, found = channels(original, compressed)
    v = factors.clone().requires_grad_()
    p, q = (logits(h.double()).log_softmax(-1).flatten(0, -2) for h in (original, compressed * v))
    kl = functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert found.after == pytest.approx(float(kl.detach()), rel=1e-4)
    (kl + (v - found.value).square().sum() / (2 * SPREAD**2 * 100)).backward()
    assert v.grad is not None
    assert v.grad.abs().max() < 1e-3
    assert found.after < fit(original, compressed).after


def test_few_tokens_hold_the_factors_near_one_number() -> None:
    original = normal(1, 2, 8, seed=1)
    factors, found = channels(original, original + 0.5 * normal(1, 2, 8, seed=2))
    assert (factors - found.value).abs().max() < SPREAD
