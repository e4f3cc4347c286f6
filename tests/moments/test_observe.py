from __future__ import annotations

import pytest
import torch
from torch import nn

from lrc.moments.observe import observe


class Named(nn.Linear):
    """Called by keyword, as some attention modules are."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Named(2, 3), nn.Linear(3, 2)
        self.ran: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        middle = self.first(hidden_states=x)
        self.ran.append("first")
        out = self.second(middle)
        self.ran.append("second")
        return out


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_sees_inputs_and_outputs_and_changes_nothing():
    module, x = Halves(), torch.randn(4, 2)
    expected = module(x)
    with observe(module, {"a": "first", "b": "second"}) as calls:
        out = module(x)
    assert torch.equal(out, expected)
    assert calls["a"].input is x
    assert torch.equal(calls["a"].output, module.first(x))
    assert calls["b"].input is calls["a"].output
    assert torch.equal(calls["b"].output, out)
    assert hooks(module) == 0


def test_one_submodule_under_two_names():
    module = Halves()
    with observe(module, {"a": "first", "b": "first"}) as calls:
        module(torch.randn(4, 2))
    assert calls["a"].input is calls["b"].input
    assert calls["a"].output is calls["b"].output


def test_stops_before_the_submodule_it_is_told():
    module, x = Halves(), torch.randn(4, 2)
    with observe(module, {"a": "first", "b": "second"}, stop_at="b") as calls:
        module(x)
    assert module.ran == ["first"]
    assert torch.equal(calls["b"].input, module.first(x))
    assert calls["b"].output is None
    assert hooks(module) == 0


def test_hooks_come_off_after_an_error_which_goes_on():
    module = Halves()
    with pytest.raises(RuntimeError, match="mat1"), observe(module, {"a": "first"}):
        module(torch.randn(4, 5))
    assert hooks(module) == 0
