from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lrc.allocation import ALLOCATORS, uniform
from lrc.allocation.contract import blank_curves
from lrc.allocation.sizing import Limits
from lrc.allocation.spend import Curve, allocate
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
    # the fine ones take up what the coarsest leaves
    coarsest = max(curve.step * curve.unit / curve.whole for curve in found.curves)
    for curve, size in zip(found.curves, bought.sizes, strict=True):
        assert abs(curve.kept(size) / curve.whole - keep) <= coarsest
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


def test_a_curve_ends_at_the_size_at_which_its_own_method_is_exact(
    tiny_checkpoint: Any, setting: Any
) -> None:
    text = (
        "method: svd\nlayers: [{match: 1, method: monarch}, {match: 1, fc_in: {method: monarch, blocks: 2}}]"
    )
    plan = setting(tiny_checkpoint("gpt2"), text)
    full = {(c.layer, c.target): c.full for c in blank_curves(plan.reader.architecture, plan.plans)}
    assert (full[0, "q"], full[0, "fc_in"]) == (32, 32)
    assert (full[1, "q"], full[1, "fc_in"]) == (8, 16)  # of a block


def test_factors_are_exact_at_full_size_and_the_matrix_itself_at_its_own_weights() -> None:
    # 64 weights, as many as of rank 4; rank 8 is exact, and roots of costs are straight from 2 to there.
    pair = Curve(0, "q", (1, 2), (49.0, 36.0), 8, 16, 64)
    cost = {size: allocate([replace(pair, floor=size, cap=size)], 64).cost for size in (1, 2, 3)}
    assert cost == pytest.approx({1: 49.0, 2: 36.0, 3: 25.0})
    assert allocate([pair], 64).sizes == (8,)
    assert (allocate([pair], 64).weights, allocate([pair], 64).cost) == (64, 0.0)
    assert allocate([pair], 63).sizes == (3,)
