"""What every storage kind must do, over all that the folder scan finds."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrc.modules import StructuredLinear, kinds
from lrc.modules.monarch import MonarchLinear

EXAMPLES: dict[str, dict[str, Any]] = {
    "low_rank": {"kind": "low_rank", "in": 12, "out": 20, "rank": 5},
    "monarch": {"kind": "monarch", "in": 12, "out": 20, "blocks": 4, "rank": 2},
}
CASES = [(name, bias) for name in sorted(kinds()) for bias in (False, True)]


def filled(entry: dict[str, Any]) -> tuple[StructuredLinear, dict[str, Tensor], Tensor | None]:
    """A module of random parameters, its factors by name and its bias."""
    module = kinds()[entry["kind"]].from_entry(entry).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    factors = {name.split(".")[0]: t for name, t in tensors.items() if name.split(".")[-1] != "bias"}
    bias = next((t for name, t in tensors.items() if name.split(".")[-1] == "bias"), None)
    return module, factors, bias


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{'bias' if case[1] else 'plain'}")
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    torch.manual_seed(0)
    name, bias = request.param
    return {**EXAMPLES[name], "bias": bias}


def test_forward_is_the_dense_map(case: dict[str, Any]) -> None:
    module, factors, bias = filled(case)
    x = torch.randn(2, 3, case["in"], dtype=torch.float64)
    dense = module.dense(factors)
    assert dense.shape == (case["out"], case["in"])
    torch.testing.assert_close(module(x), F.linear(x, dense, bias), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module(x[0, 0]), module(x)[0, 0])


def test_entry_round_trip(case: dict[str, Any]) -> None:
    module, factors, bias = filled(case)
    entry = type(module).entry(factors, bias is not None)
    assert json.loads(json.dumps(entry)) == case
    again = type(module).from_entry(entry)
    again.load_factors({name: tensor.detach() for name, tensor in factors.items()}, bias)
    assert again.factors.keys() == factors.keys()
    assert all(torch.equal(again.factors[name], factor) for name, factor in factors.items())
    torch.testing.assert_close(again.offset, bias, rtol=0, atol=0)
    x = torch.randn(4, case["in"], dtype=torch.float64)
    assert torch.equal(again(x), module(x))
    assert {n: t.dtype for n, t in again.state_dict().items()} == {
        n: t.dtype for n, t in module.state_dict().items()
    }


def test_factor_names_and_parameter_count(case: dict[str, Any]) -> None:
    module, factors, bias = filled(case)
    assert set(factors) == set(module.factor_names)
    assert module.parameter_count(case) == sum(tensor.numel() for tensor in factors.values())
    assert (bias is not None) == case["bias"]


def test_guard_is_empty_and_saved(case: dict[str, Any]) -> None:
    module, *_ = filled(case)
    assert module.state_dict()["weight"].shape == (0,)
    assert module.weight.dtype == torch.float64


def test_output_linear_is_the_last_map(case: dict[str, Any]) -> None:
    module, _, bias = filled(case)
    last = module.output_linear
    if last is None:
        return
    x = torch.randn(4, case["in"], dtype=torch.float64)
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        y = module(x)
        handle.remove()
        torch.testing.assert_close(F.linear(seen[0], last.weight, bias), y)


def test_gradients_reach_every_parameter(case: dict[str, Any]) -> None:
    module, *_ = filled(case)
    module(torch.randn(4, case["in"], dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@settings(max_examples=25, deadline=None)
@given(
    blocks=st.integers(1, 5),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 4),
    rank=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_monarch_is_a_grid_of_pairs(blocks: int, inputs: int, outputs: int, rank: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    left = torch.randn(blocks, outputs, blocks * rank, generator=draw, dtype=torch.float64)
    right = torch.randn(blocks, blocks * rank, inputs, generator=draw, dtype=torch.float64)
    grid = torch.zeros(blocks * outputs, blocks * inputs, dtype=torch.float64)
    for j in range(blocks):
        for k in range(blocks):
            block = left[j][:, k * rank : (k + 1) * rank] @ right[k][j * rank : (j + 1) * rank]
            grid[j * outputs : (j + 1) * outputs, k * inputs : (k + 1) * inputs] = block
    factors = {"L": left, "R": right}
    torch.testing.assert_close(MonarchLinear.dense(factors), grid)
    module = MonarchLinear.from_entry(MonarchLinear.entry(factors, bias=False))
    module.load_factors(factors, None)
    x = torch.randn(3, blocks * inputs, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(module(x), x @ grid.T)
