from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrc.methods.contract import Affine
from lrc.refit import RIDGE, RefitSum

CPU = torch.device("cpu")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def seen() -> tuple[Tensor, Tensor, Affine]:
    """Inputs (3, 40, 6), targets (3, 40, 4) and a start."""
    x = normal(3, 40, 6, seed=1) @ normal(6, 6, seed=2) + normal(6, seed=3)
    t = x @ normal(6, 4, seed=4) + 0.5 * normal(3, 40, 4, seed=5) + normal(4, seed=6)
    return x, t, Affine(normal(4, 6, seed=7), normal(4, seed=8))


def summed(x: Tensor, t: Tensor) -> RefitSum:
    total = RefitSum(x.shape[-1], t.shape[-1], CPU)
    for rows, wanted in zip(x, t, strict=True):
        total.add(rows[None], wanted[None])
    return total


def ridge_on_tokens(x: Tensor, t: Tensor, start: Affine, ridge: float) -> tuple[Tensor, Tensor | None]:
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
    return found[:, :width], found[:, width] if start.bias is not None else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [1e-3, RIDGE, 10.0])
def test_is_ridge_regression_on_the_tokens(seen, bias, ridge):
    x, t, start = seen
    start = start if bias else Affine(start.weight)
    fitted, damping = summed(x, t).solve(start, ridge)
    weight, offset = ridge_on_tokens(x, t, start, ridge)
    torch.testing.assert_close(fitted.weight, weight, rtol=1e-4, atol=1e-4)
    assert damping == ridge
    if bias:
        torch.testing.assert_close(fitted.bias, offset, rtol=1e-4, atol=1e-4)
    else:
        assert fitted.bias is None


def test_an_endless_ridge_leaves_the_weights_and_fits_the_bias(seen):
    x, t, start = seen
    fitted, _ = summed(x, t).solve(start, 1e9)
    torch.testing.assert_close(fitted.weight, start.weight.double(), rtol=1e-5, atol=1e-5)
    left = (t - x @ start.weight.T).flatten(0, 1).mean(dim=0).double()
    torch.testing.assert_close(fitted.bias, left, rtol=1e-4, atol=1e-4)
    unbiased, _ = summed(x, t).solve(Affine(start.weight), 1e9)
    torch.testing.assert_close(unbiased.weight, start.weight.double(), rtol=1e-5, atol=1e-5)


def test_a_small_ridge_is_least_squares(seen):
    x, t, start = seen
    fitted, _ = summed(x, t).solve(Affine(start.weight), 1e-9)
    expected = torch.linalg.lstsq(x.flatten(0, 1).double(), t.flatten(0, 1).double()).solution.T
    torch.testing.assert_close(fitted.weight, expected, rtol=1e-3, atol=1e-3)


def test_a_start_that_is_right_stays(seen):
    x, _, start = seen
    assert start.bias is not None
    fitted, _ = summed(x, x @ start.weight.T + start.bias).solve(start)
    torch.testing.assert_close(fitted.weight, start.weight.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fitted.bias, start.bias.double(), rtol=1e-4, atol=1e-4)


def test_inputs_that_never_vary_are_left_to_the_start(seen):
    _, t, start = seen
    fitted, _ = summed(torch.zeros(3, 40, 6), t).solve(start)
    torch.testing.assert_close(fitted.weight, start.weight.double())
    torch.testing.assert_close(fitted.bias, t.flatten(0, 1).mean(dim=0).double(), rtol=1e-5, atol=1e-5)


def test_half_precision_inputs_are_summed_in_float32():
    """Ones and small ones: bfloat16 sums would stop at 256."""
    x = torch.ones(1, 5000, 2).bfloat16()
    x[..., 1] = 2**-7
    t = x.float() @ torch.tensor([[2.0], [0.0]])
    fitted, _ = summed(x, t).solve(Affine(torch.tensor([[2.0, 0.0]])))
    torch.testing.assert_close(fitted.weight, torch.tensor([[2.0, 0.0]]).double(), rtol=1e-5, atol=1e-5)
