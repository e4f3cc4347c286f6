from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lrc.moments import moment
from lrc.moments.moment import Moment, MomentSum, product

CPU = torch.device("cpu")


@pytest.fixture
def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 50, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 2


def moment_of(x: torch.Tensor) -> Moment:
    rows = x.flatten(0, -2).double()
    return Moment(rows.T @ rows / len(rows), rows.mean(dim=0), len(rows))


def close(one: Moment, other: Moment, **tolerance: Any) -> None:
    torch.testing.assert_close(one.second.double(), other.second.double(), **tolerance)
    torch.testing.assert_close(one.mean.double(), other.mean.double(), **tolerance)
    assert one.tokens == other.tokens


def test_batches_of_any_shape_add_up(tokens):
    total = MomentSum(5, CPU)
    total.add(tokens[:2])
    total.add(tokens[2:3, :17])
    total.add(tokens[2, 17:])
    total.add(tokens[3:])
    close(total.moment(), moment_of(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_that_of_the_inputs(tokens, dtype):
    total = MomentSum(5, CPU)
    for block in tokens.to(dtype):
        total.add(block)
    assert total.moment().second.dtype == torch.float32
    close(total.moment(), moment_of(tokens.to(dtype)), rtol=1e-5, atol=1e-5)


def test_first_tokens_count_as_if_they_were_there_so_often(tokens):
    total, counted = MomentSum(5, CPU), torch.cat((tokens.flatten(0, 1), *[tokens[:, 0]] * 3))
    total.add(tokens[:3], first_token=4)
    total.add(tokens[3:], first_token=4)
    close(total.moment(), replace(moment_of(counted), tokens=7 * 50), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [3, 4, 9])
def test_wide_sums_are_made_of_their_upper_blocks(width, monkeypatch):
    monkeypatch.setattr(moment, "GRAM_BLOCK", 4)
    x = torch.randn(5, 30, width, generator=torch.Generator().manual_seed(0)) + 1
    total = MomentSum(width, CPU)
    for block in x:
        total.add(block)
    found = total.moment().second
    close(total.moment(), moment_of(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.tril(-4), found.triu(4).T)


def test_long_sums_do_not_stall():
    """A thousand batches of a constant and a thousandth of it: half a million tokens."""
    total, x = MomentSum(2, CPU), torch.ones(500, 2)
    x[:, 1] = 1e-3
    for _ in range(1000):
        total.add(x)
    expected = torch.tensor([[1, 1e-3], [1e-3, 1e-6]])
    torch.testing.assert_close(total.moment().second, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(total.moment().mean, torch.tensor([1, 1e-3]), rtol=1e-4, atol=0)


def test_centred_is_the_covariance(tokens):
    expected = torch.cov(tokens.flatten(0, 1).double().T, correction=0)
    torch.testing.assert_close(moment_of(tokens).centred, expected)


def test_shifted_is_the_moment_of_the_shifted_tokens(tokens):
    offset = torch.arange(5).double()
    close(moment_of(tokens).shifted(offset), moment_of(tokens.double() - offset))


def test_double_keeps_the_values(tokens):
    total = MomentSum(5, CPU)
    total.add(tokens)
    moment = total.moment()
    assert torch.equal(moment.double().second, moment.second.double())
    assert torch.equal(moment.double().mean, moment.mean.double())


def test_product_multiplies_rows(tokens):
    left, right = tokens[0], tokens[1, :, :3]
    torch.testing.assert_close(product(left, right), left.T @ right)
    torch.testing.assert_close(
        product(left.bfloat16(), right.bfloat16()), left.bfloat16().float().T @ right.bfloat16().float()
    )
