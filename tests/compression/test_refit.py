from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lrc.compression import ridge as ridges
from lrc.compression.norms import StreamNorms, changed_norms, norm_warnings
from lrc.compression.refit import held_out_mask
from lrc.compression.ridge import REFITS, RIDGE, RIDGES, RefitRecord, RefitSum
from lrc.methods.contract import Affine

CPU = torch.device("cpu")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def seen() -> tuple[Tensor, Tensor, Affine]:
    """Inputs (10, 12, 6), targets (10, 12, 4) and a start."""
    x = normal(10, 12, 6, seed=1) @ normal(6, 6, seed=2) + normal(6, seed=3)
    t = x @ normal(6, 4, seed=4) + 0.5 * normal(10, 12, 4, seed=5) + normal(4, seed=6)
    return x, t, Affine(normal(4, 6, seed=7), normal(4, seed=8))


def applied(x: Tensor, affine: Affine) -> Tensor:
    return functional.linear(
        x.double(), affine.weight.double(), None if affine.bias is None else affine.bias.double()
    )


def solved(
    x: Tensor, t: Tensor, start: Affine, held: Tensor | None = None, size: int = 1
) -> tuple[Affine, RefitRecord]:
    """The refit of a stream that is at zero before the projection, in batches of ``size`` blocks."""
    chosen = torch.zeros(len(x), dtype=torch.bool) if held is None else held
    total = RefitSum(x.shape[-1], t.shape[-1], CPU)
    for kept_out in (False, True):
        mask = chosen if kept_out else ~chosen
        for rows, goal in zip(x[mask].split(size), t[mask].split(size), strict=True):
            if len(rows):
                total.add(rows, goal, applied(rows, start).float(), kept_out)
    return total.solve(start, 3, "o")


def fixed(monkeypatch: pytest.MonkeyPatch, ridge: float) -> None:
    monkeypatch.setattr(ridges, "RIDGE", ridge)


def ridge_on_tokens(x: Tensor, t: Tensor, start: Affine, ridge: float) -> Affine:
    """The same problem as least squares on the tokens, with the ridge as rows of its own."""
    x, t = x.flatten(0, 1).double(), t.flatten(0, 1).double()
    rows, width = x.shape
    about = x - x.mean(dim=0) if start.bias is not None else x
    weight = (ridge * rows * about.square().sum(dim=1).mean() / width) ** 0.5
    ones = torch.ones(rows, 1).double() if start.bias is not None else torch.zeros(rows, 0).double()
    left = torch.cat([x, ones], dim=1)
    pull = torch.cat([weight * torch.eye(width).double(), torch.zeros(width, ones.shape[1]).double()], dim=1)
    right = torch.cat([t, weight * start.weight.T.double()])
    found = torch.linalg.lstsq(torch.cat([left, pull]), right).solution.T
    return Affine(found[:, :width], found[:, width] if start.bias is not None else None)


def relative(x: Tensor, t: Tensor, affine: Affine) -> float:
    return float((t.double() - applied(x, affine)).square().sum() / t.double().square().sum())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [1e-3, RIDGE, 10.0])
def test_is_ridge_regression_on_the_tokens(seen, bias, ridge, monkeypatch):
    x, t, start = seen
    start = start if bias else Affine(start.weight)
    fixed(monkeypatch, ridge)
    (fitted, found), expected = solved(x, t, start), ridge_on_tokens(x, t, start, ridge)
    torch.testing.assert_close(fitted.weight, expected.weight, rtol=1e-4, atol=1e-4)
    assert (found.ridge, found.raised, found.held_out) == (ridge, None, None)
    assert found.error.before == pytest.approx(relative(x, t, start), rel=1e-4)
    assert found.error.after == pytest.approx(relative(x, t, expected), rel=1e-3)
    if bias:
        torch.testing.assert_close(fitted.bias, expected.bias, rtol=1e-4, atol=1e-4)
    else:
        assert fitted.bias is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("noise", "far"), [(0.1, 1.0), (2.0, 0.5), (3.0, 0.3)])
def test_the_ridge_has_the_least_error_on_the_held_out_mask(bias, noise, far):
    x, truth = normal(9, 8, 20, seed=1) + normal(20, seed=9), normal(4, 20, seed=2)
    t = x @ truth.T + noise * normal(9, 8, 4, seed=3)
    start = Affine(truth + far * normal(4, 20, seed=4), normal(4, seed=5) if bias else None)
    held = held_out_mask(9)
    fitted, found = solved(x, t, start, held, size=2)
    errors = {
        ridge: relative(x[held], t[held], ridge_on_tokens(x[~held], t[~held], start, ridge))
        for ridge in RIDGES
    }
    assert found.ridge == min(errors, key=errors.__getitem__)
    assert found.held_out is not None
    assert found.held_out.before == pytest.approx(relative(x[held], t[held], start), rel=1e-4)
    assert found.held_out.after == pytest.approx(errors[found.ridge], rel=1e-3)
    assert found.applied
    expected = ridge_on_tokens(x[~held], t[~held], start, found.ridge)
    torch.testing.assert_close(fitted.weight, expected.weight, rtol=1e-4, atol=1e-4)
    assert found.error.after == pytest.approx(relative(x[~held], t[~held], expected), rel=1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_a_refit_that_loses_on_the_held_out_blocks_is_not_applied(bias):
    """Targets are the start's and noise: a fit to the noise of a few tokens raises the error of others."""
    x, truth = normal(9, 4, 30, seed=1), normal(4, 30, seed=2)
    start, held = Affine(truth, torch.zeros(4) if bias else None), held_out_mask(9)
    fitted, found = solved(x, x @ truth.T + normal(9, 4, 4, seed=3), start, held)
    assert fitted is start
    assert not found.applied
    assert found.error.after < found.error.before
    assert found.held_out is not None
    assert found.held_out.after > found.held_out.before


def test_wide_outputs_are_compared_in_some_directions(monkeypatch):
    """Which is nearly as good, and the errors that are told are those of all outputs."""
    x, truth = normal(9, 8, 20, seed=1), normal(64, 20, seed=2)
    t = x @ truth.T + 2 * normal(9, 8, 64, seed=3)
    start, held = Affine(truth + 0.5 * normal(64, 20, seed=4)), held_out_mask(9)
    _, every = solved(x, t, start, held)
    monkeypatch.setattr(ridges, "DIRECTIONS", 16)
    _, some = solved(x, t, start, held)
    assert every.held_out is not None
    assert some.held_out is not None
    assert some.held_out.after <= 1.05 * every.held_out.after
    exact = relative(x[held], t[held], ridge_on_tokens(x[~held], t[~held], start, some.ridge))
    assert some.held_out.after == pytest.approx(exact, rel=1e-3)
    monkeypatch.setattr(ridges, "RIDGES", (1e6, some.ridge))
    assert solved(x, t, start, held)[1].ridge == some.ridge


def test_data_choose_different_ridges():
    """So that the test above compares more than one constant with itself."""
    chosen = set()
    for noise, far in ((0.1, 1.0), (2.0, 0.5), (3.0, 0.3)):
        x, truth = normal(9, 8, 20, seed=1), normal(4, 20, seed=2)
        start = Affine(truth + far * normal(4, 20, seed=4))
        t = x @ truth.T + noise * normal(9, 8, 4, seed=3)
        chosen.add(solved(x, t, start, held_out_mask(9))[1].ridge)
    assert len(chosen) == 3


def test_batches_do_not_matter(seen):
    x, t, start = seen
    (fitted, one), *others = (solved(x, t, start, held_out_mask(len(x)), size) for size in (1, 3, 10))
    for solution, other in others:
        assert other.ridge == one.ridge
        assert one.held_out is not None
        assert other.held_out is not None
        torch.testing.assert_close(solution.weight, fitted.weight, rtol=1e-4, atol=1e-4)
        assert other.held_out.after == pytest.approx(one.held_out.after, rel=1e-4)


@pytest.mark.parametrize(
    ("count", "held"), [(1, []), (2, [0]), (15, [0]), (31, [0]), (32, [0, 17]), (47, [0, 17])]
)
def test_blocks_are_held_out_by_their_number(count, held):
    assert held_out_mask(count).nonzero().flatten().tolist() == held


@pytest.mark.parametrize("sources", [2, 3, 4, 8])
def test_interleaved_texts_are_all_held_out_alike(sources):
    counts = torch.bincount(held_out_mask(768).nonzero().flatten() % sources, minlength=sources)
    assert counts.sum() == 48
    assert counts.min() == counts.max()


def test_an_endless_ridge_leaves_the_weights_and_fits_the_bias(seen, monkeypatch):
    x, t, start = seen
    fixed(monkeypatch, 1e9)
    fitted = solved(x, t, start)[0]
    torch.testing.assert_close(fitted.weight, start.weight.double(), rtol=1e-5, atol=1e-5)
    left = (t - x @ start.weight.T).flatten(0, 1).mean(dim=0).double()
    torch.testing.assert_close(fitted.bias, left, rtol=1e-4, atol=1e-4)
    unbiased = solved(x, t, Affine(start.weight))[0]
    torch.testing.assert_close(unbiased.weight, start.weight.double(), rtol=1e-5, atol=1e-5)


def test_a_small_ridge_is_least_squares(seen, monkeypatch):
    x, t, start = seen
    fixed(monkeypatch, 1e-9)
    fitted = solved(x, t, Affine(start.weight))[0]
    expected = torch.linalg.lstsq(x.flatten(0, 1).double(), t.flatten(0, 1).double()).solution.T
    torch.testing.assert_close(fitted.weight, expected, rtol=1e-3, atol=1e-3)


def test_a_start_that_is_right_stays(seen):
    x, _, start = seen
    fitted, found = solved(x, applied(x, start).float(), start, held_out_mask(len(x)))
    assert fitted is start
    assert not found.applied
    assert found.error.after == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("held", [True, False])
def test_inputs_that_never_vary_are_left_to_the_start(seen, held):
    _, t, start = seen
    mask = held_out_mask(len(t)) if held else torch.zeros(len(t), dtype=torch.bool)
    fitted, found = solved(torch.zeros(10, 12, 6), t, start, mask)
    torch.testing.assert_close(fitted.weight.double(), start.weight.double())
    mean = t[~mask].flatten(0, 1).mean(dim=0).double()
    assert start.bias is not None
    assert fitted.bias is not None
    kept = mean if found.applied else start.bias.double()
    torch.testing.assert_close(fitted.bias.double(), kept, rtol=1e-5, atol=1e-5)
    assert found.ridge == (max(RIDGES) if held else RIDGE)


def test_a_ridge_too_small_for_the_sums_is_raised_and_said(monkeypatch):
    """Inputs that are one: without any ridge there is no factor."""
    fixed(monkeypatch, 0.0)
    x = normal(2, 40, 1, seed=1) * normal(30, seed=2)
    _, found = solved(x, x[..., :1], Affine(torch.zeros(1, 30)))
    assert found.ridge == 0
    assert found.raised is not None
    assert found.raised > 0


def test_half_precision_inputs_are_summed_in_float32(monkeypatch):
    """Ones and small ones: bfloat16 sums would stop at 256."""
    x = torch.ones(1, 5000, 2).bfloat16()
    x[..., 1] = 2**-7
    t = x.float() @ torch.tensor([[2.0], [0.0]])
    fixed(monkeypatch, 1e-6)
    fitted = solved(x, t, Affine(torch.tensor([[0.0, 0.0]])))[0]
    assert float(applied(x[0, 0], fitted)) == pytest.approx(2, rel=1e-4)


def test_records_survive_json(seen):
    x, t, start = seen
    for mask in (None, held_out_mask(len(x))):
        _, record = solved(x, t, start, mask)
        assert REFITS.validate_python([asdict(record)]) == [record]


def test_norms_change_below_half_and_above_twice() -> None:
    stream = torch.tensor([[0.4, 0.6, 1.9, 2.1], [0.5, 2.0, 1.0, 3.0]])[..., None]
    assert changed_norms(stream, torch.ones(2, 4, 1)).tolist() == [8, 3, 2, 1]


def test_the_first_layer_with_manychanged_norms_is_warned_of() -> None:
    few, many, more = (
        StreamNorms(0, 100, 5, 20, 1),
        StreamNorms(1, 100, 2, 20, 2),
        StreamNorms(2, 100, 90, 20, 2),
    )
    assert norm_warnings([]) == []
    assert norm_warnings([few]) == []
    assert norm_warnings([StreamNorms(0, 100, 1, 16, 1)]) == []  # one first token is no pattern
    (warning,) = norm_warnings([few, many, more])
    assert warning.startswith(
        "after layer 1, 2 of 100 tokens (2 of 20 first tokens of a block) have less than half or more than twice the "
        "original's norm in the residual stream, "
    )
