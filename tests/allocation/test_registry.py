from __future__ import annotations

from typing import Any

import pytest

from lrc.allocate import Curve, allocate
from lrc.allocation import ALLOCATORS, uniform
from lrc.allocation.sizing import Limits
from lrc.errors import UserError
from lrc.plan.schema import ALLOCATIONS


def test_a_plan_may_name_every_allocation_there_is() -> None:
    assert set(ALLOCATIONS) == set(ALLOCATORS)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("keep", [0.15, 0.5, 0.83])
def test_uniform_keeps_the_same_fraction_of_everything(
    tiny_checkpoint: Any, setting: Any, family: str, keep: float
) -> None:
    plan = setting(tiny_checkpoint(family, head_dim=16) if family == "llama" else tiny_checkpoint(family), "")
    found = uniform.costs(plan, lambda done: None)
    budget = int(keep * sum(curve.whole for curve in found.curves))
    bought = allocate(found.curves, budget)
    coarsest = max(curve.step / curve.full for curve in found.curves)  # the fine ones take up what it leaves
    for curve, size in zip(found.curves, bought.sizes, strict=True):
        assert abs(size / curve.full - keep) <= coarsest
    assert budget - bought.weights < max(curve.unit * curve.step for curve in found.curves)


def test_limits_are_fractions_of_weights_and_leave_legal_sizes() -> None:
    component = Curve(1, "mlp", (3, 5), (2.0, 1.0), 10, 7, 70)
    assert Limits().on(component).legal == [3, 4, 5, 6, 7, 8, 9, 10]
    assert Limits(floor=0.45).on(component).legal == [5, 6, 7, 8, 9, 10]
    assert Limits(floor=0.5, cap=0.8).on(component).legal == [5, 6, 7, 8]
    assert Limits(round_to=4).on(component).legal == [4, 8, 10]
    assert Limits(round_to=4, cap=0.8).on(component).legal == [4, 8]
    pair = Curve(0, "q", (1, 2, 3, 4), (4.0, 3.0, 2.0, 1.0), 8, 16, 64)  # all 64 weights at rank 4 of 8
    assert Limits().on(pair).legal == [1, 2, 3, 8]
    assert Limits(floor=0.5).on(pair).legal == [2, 3, 8]
    assert Limits(cap=0.5).on(pair).legal == [1, 2]
    with pytest.raises(UserError, match=r"--cap 0\.2 leaves q of layer 0 no size; its smallest keeps 0\.25"):
        Limits(cap=0.2).on(pair)
