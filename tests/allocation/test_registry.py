from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest

from lrc.allocation import ALLOCATORS
from lrc.allocation.sizing import Limits
from lrc.allocation.spend import Curve, Offer, allocate
from lrc.errors import UserError
from lrc.families import Matrix, Target
from lrc.methods.sizes import ComponentRank, PairRank, SizeValue
from lrc.plan.schema import Allocation


def test_a_plan_may_name_every_allocation_there_is() -> None:
    assert set(get_args(Allocation)) == set(ALLOCATORS)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("keep", [0.15, 0.5, 0.83])
def test_uniform_keeps_the_same_fraction_of_everything(
    tiny_checkpoint: Any, setting: Any, offered: Any, family: str, keep: float
) -> None:
    plan = setting(tiny_checkpoint(family, head_dim=16) if family == "llama" else tiny_checkpoint(family), "")
    curves, _ = ALLOCATORS["uniform"].curves(plan, lambda done: None)
    budget = int(keep * sum(curve.whole for curve in curves))
    offers = offered(plan, curves)
    bought = allocate(offers, budget)
    # the fine ones take up what the coarsest leaves
    steps = [offer.choices[1].weights - offer.choices[0].weights for offer in offers]
    coarsest = max(step / offer.curve.whole for step, offer in zip(steps, offers, strict=True))
    for offer, choice in zip(offers, bought.choices, strict=True):
        assert abs(choice.weights / offer.curve.whole - keep) <= coarsest
    assert budget - bought.weights < max(steps)


def pair(limits: Limits) -> Offer:
    """A matrix of 64 weights, as many as a pair of rank 4 has, whose full rank is 8."""
    target = Target("q", {"q": Matrix(8, 8, False)}, 8, 1, 16)
    curve = Curve(0, "q", (1, 2), (16, 32), (49.0, 36.0), 8, 128, 64)
    return limits.on(curve, PairRank(), target, {}, 4)


def test_limits_are_fractions_of_weights_and_leave_legal_sizes() -> None:
    def component(limits: Limits) -> list[SizeValue]:
        target = Target("mlp", {"down": Matrix(7, 10, False)}, 10, 1, 7)
        curve = Curve(1, "mlp", (3, 5), (21, 35), (2.0, 1.0), 10, 70, 70)
        return [c.size for c in limits.on(curve, ComponentRank(), target, {}, 4).choices]

    assert component(Limits()) == [3, 4, 5, 6, 7, 8, 9, 10]
    assert component(Limits(floor=0.45)) == [5, 6, 7, 8, 9, 10]
    assert component(Limits(floor=0.5, cap=0.8)) == [5, 6, 7, 8]
    assert component(Limits(round_to=4)) == [4, 8, 10]
    assert component(Limits(round_to=4, cap=0.8)) == [4, 8]
    assert [c.size for c in pair(Limits()).choices] == [1, 2, 3, 8]
    assert [c.size for c in pair(Limits(floor=0.5)).choices] == [2, 3, 8]
    assert [c.size for c in pair(Limits(cap=0.5)).choices] == [1, 2]
    with pytest.raises(UserError, match=r"--cap 0\.2 leaves q of layer 0 no size; its smallest keeps 0\.25"):
        pair(Limits(cap=0.2))


def test_a_curve_ends_at_the_size_at_which_its_own_method_is_exact(
    tiny_checkpoint: Any, setting: Any
) -> None:
    text = (
        "method: svd\nlayers: [{match: 1, method: monarch}, {match: 1, fc_in: {method: monarch, blocks: 2}}]"
    )
    plan = setting(tiny_checkpoint("gpt2"), text)
    full = {
        (c.layer, c.target): c.full for c in ALLOCATORS["energy"].blank(plan.reader.architecture, plan.plans)
    }
    assert (full[0, "q"], full[0, "fc_in"]) == (32, 32)
    assert (full[1, "q"], full[1, "fc_in"]) == (8, 16)  # of a block


def test_factors_are_exact_at_full_size_and_the_matrix_itself_at_its_own_weights() -> None:
    # Roots of costs are straight from rank 2 to rank 8, which is exact.
    offer = pair(Limits())
    cost = {c.size: allocate([replace(offer, choices=(c,))], 64).cost for c in offer.choices[:-1]}
    assert cost == pytest.approx({1: 49.0, 2: 36.0, 3: 25.0})
    found = allocate([offer], 64)
    assert (found.choices[0].size, found.weights, found.cost) == (8, 64, 0.0)
    assert allocate([offer], 63).choices[0].size == 3
