"""What every storage kind must do, over all that the folder scan finds."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lrc.errors import UserError
from lrc.families import family_of
from lrc.modules import Factors, StructuredLinear, kind_of, kinds
from lrc.modules.monarch import MonarchLinear
from lrc.modules.table import apply_table

FAKES = Path(__file__).parents[1] / "fakes.py"


def filled(entry: dict[str, Any]) -> tuple[StructuredLinear, Factors]:
    """A module of random parameters, and its factors with its bias."""
    module = kind_of(entry).from_entry(entry).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module, Factors(entry["kind"], module.factors, module.offset)


def tensors(factors: Factors) -> list[Tensor]:
    """Every tensor of factors, those of held kinds too."""
    held = factors.tensors.values()
    return [t for each in held for t in (tensors(each) if isinstance(each, Factors) else [each])]


@pytest.fixture(autouse=True)
def sum_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that holds kinds, beside those of the folder."""
    monkeypatch.setitem(kinds(), "sum", runpy.run_path(str(FAKES))["SumLinear"])


@pytest.fixture(
    params=[(name, bias) for name in [*sorted(kinds()), "sum"] for bias in (False, True)], ids=str
)
def case(request: pytest.FixtureRequest, sum_kind: None) -> dict[str, Any]:
    torch.manual_seed(0)
    name, bias = request.param
    return {"kind": name, **kinds()[name].tiny, "bias": bias}


def test_forward_is_the_dense_map(case: dict[str, Any]) -> None:
    module, factors = filled(case)
    x = torch.randn(2, 3, case["in"], dtype=torch.float64)
    assert factors.dense.shape == (case["out"], case["in"])
    torch.testing.assert_close(module(x), F.linear(x, factors.dense, factors.bias), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module(x[0, 0]), module(x)[0, 0])


def test_entry_round_trip(case: dict[str, Any]) -> None:
    module, factors = filled(case)
    entry = type(module).entry(factors.tensors, factors.bias is not None)
    assert json.loads(json.dumps(entry)) == case
    again = type(module).from_entry(entry)
    again.load_factors(factors.to(torch.float64).tensors, factors.bias)
    assert again.factors.keys() == factors.tensors.keys()
    held = tensors(Factors(case["kind"], again.factors))
    assert all(torch.equal(one, other) for one, other in zip(held, tensors(factors), strict=True))
    torch.testing.assert_close(again.offset, factors.bias, rtol=0, atol=0)
    x = torch.randn(4, case["in"], dtype=torch.float64)
    assert torch.equal(again(x), module(x))
    assert {n: t.dtype for n, t in again.state_dict().items()} == {
        n: t.dtype for n, t in module.state_dict().items()
    }


def test_states_its_weights_and_its_bytes_on_disk(case: dict[str, Any], tmp_path: Path) -> None:
    module, factors = filled(case)
    assert set(factors.tensors) == set(module.factor_names)
    assert (factors.bias is not None) == case["bias"]
    assert module.parameter_count(case) == sum(tensor.numel() for tensor in tensors(factors))
    for dtype in (torch.float32, torch.bfloat16):
        save_file({n: t.contiguous() for n, t in module.to(dtype).state_dict().items()}, tmp_path / "kind")
        stored = sum(t.nbytes for t in load_file(tmp_path / "kind").values())
        bias = case["out"] * dtype.itemsize if case["bias"] else 0
        assert stored == module.parameter_count(case) * dtype.itemsize + bias


def test_states_the_multiplications_of_a_token(case: dict[str, Any]) -> None:
    module, _ = filled(case)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        module(torch.randn(7, case["in"], dtype=torch.float64))
    assert counted.get_total_flops() == 2 * 7 * module.operations(case)


def test_an_unknown_kind_inside_another_is_named(sum_kind: None) -> None:
    entry = {"kind": "sum", "in": 12, "out": 20, "parts": [{"kind": "low_rnk"}], "bias": False}
    with pytest.raises(UserError, match=r"'x' is stored as 'low_rnk'.*did you mean 'low_rank'"):
        apply_table(torch.nn.ModuleDict({"x": torch.nn.Linear(12, 20)}), {"x": entry}, family_of("llama"))


def test_guard_is_empty_and_saved(case: dict[str, Any]) -> None:
    module, _ = filled(case)
    assert module.state_dict()["weight"].shape == (0,)
    assert module.weight.dtype == torch.float64


def test_output_linear_is_the_last_map(case: dict[str, Any]) -> None:
    module, factors = filled(case)
    last = module.output_linear
    if last is None:
        return
    x = torch.randn(4, case["in"], dtype=torch.float64)
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        y = module(x)
        handle.remove()
        torch.testing.assert_close(F.linear(seen[0], last.weight, factors.bias), y)


def test_gradients_reach_every_parameter(case: dict[str, Any]) -> None:
    module, _ = filled(case)
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
