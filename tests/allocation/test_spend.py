from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc.allocation.spend import Allocation, Choice, Curve, Offer, allocate
from lrc.methods.sizes import SizeValue


def options(offer: Offer) -> list[tuple[SizeValue, int, float]]:
    """Every choice with its weights and its nats, written down from what the contract says of them."""
    curve = offer.curve
    points = [*curve.weights, curve.exact]
    power = exponent(curve)
    roots = [value ** (1 / power) for value in (*falling(curve.costs), 0.0)]
    found = []
    for choice in offer.choices:
        x = curve.exact if choice.size == curve.full else choice.weights
        right = next(i for i in range(1, len(points)) if points[i] >= x)
        share = (x - points[right - 1]) / (points[right] - points[right - 1])
        found.append(
            (choice.size, choice.weights, ((1 - share) * roots[right - 1] + share * roots[right]) ** power)
        )
    return found


def exponent(curve: Curve) -> float:
    """How costs grow with what is removed, between the two largest neighbours whose costs are known to differ."""
    costs = falling(curve.costs)
    for i in range(len(costs) - 1, 0, -1):
        if costs[i - 1] > costs[i] > 0:
            removed = [curve.exact - curve.weights[each] for each in (i - 1, i)]
            return sorted((1.0, math.log(costs[i - 1] / costs[i]) / math.log(removed[0] / removed[1]), 2.0))[
                1
            ]
    return 2.0


def falling(values: tuple[float, ...]) -> list[float]:
    """Least squares under a falling order by its min-max formula, and not below 0."""
    ends = range(len(values))
    means = {(a, b): sum(values[a : b + 1]) / (b + 1 - a) for a in ends for b in ends if a <= b}
    return [max(min(max(means[a, b] for b in ends if b >= i) for a in ends if a <= i), 0.0) for i in ends]


def cheapest(curves: list[Offer], budget: int) -> float:
    """Least nats of all combinations within a budget."""
    combinations = itertools.product(*(options(curve) for curve in curves))
    return min(sum(n for *_, n in c) for c in combinations if sum(w for _, w, _ in c) <= budget)


def offer(
    sizes: Sequence[int],
    nats: Sequence[float],
    full: int,
    unit: int,
    whole: int,
    choices: Sequence[int],
    name: tuple[int, str] = (0, "mlp"),
) -> Offer:
    """A curve of ranks of ``unit`` weights each, and ranks that may be bought, ``full`` being the target as it is."""
    weights = tuple(n * unit for n in sizes)
    curve = Curve(*name, tuple(sizes), weights, tuple(nats), full, full * unit, whole)
    as_it_is = Choice(full, whole, 2 * whole, full)
    ranks = (Choice(n, n * unit, 2 * n * unit, n) for n in choices if n != full)
    return Offer(curve, (*ranks, *([as_it_is] if full in choices else [])), as_it_is)


def quadratic(layer: int, scale: float, full: int = 6, unit: int = 4, step: int = 1) -> Offer:
    """Costs that grow with the square of what is lost."""
    sizes = range(step, full, step)
    nats = [scale * (full - n) ** 2 for n in sizes]
    return offer(sizes, nats, full, unit, full * unit, [*sizes, full], (layer, "mlp"))


@st.composite
def any_offer(draw: st.DrawFn) -> Offer:
    full, unit = draw(st.integers(3, 9)), draw(st.integers(1, 7))
    sizes = sorted(draw(st.sets(st.integers(1, full - 1), min_size=1, max_size=4)))
    nats = [draw(st.floats(-0.5, 3)) for _ in sizes]
    step = draw(st.sampled_from([1, 1, 2]))
    # A pair may reach the weights of its matrix before full rank, but it was measured below them.
    whole = draw(st.integers(sizes[-1] * unit + 1, full * unit))
    floor = draw(st.integers(0, full - 1))
    legal = [n for n in range(max(sizes[0], floor), full) if n % step == 0 and n * unit < whole]
    cap = draw(st.integers(floor, full - 1))
    capped = [n for n in legal if n <= cap]
    choices = draw(st.sampled_from([[*legal, full], capped])) if capped else [*legal, full]
    return offer(sizes, nats, full, unit, whole, choices)


curve_lists = st.lists(any_offer(), min_size=1, max_size=3)


def sizes(found: Allocation) -> tuple[SizeValue, ...]:
    return tuple(choice.size for choice in found.choices)


@pytest.mark.parametrize("budget", range(12, 73, 4))
def test_is_optimal_where_costs_are_convex(budget):
    curves = [quadratic(0, 1.0), quadratic(1, 0.3), quadratic(2, 0.05)]
    found = allocate(curves, budget)
    assert found.cost == pytest.approx(cheapest(curves, budget), abs=1e-9)
    assert found.weights == budget


@settings(deadline=None)
@given(curve_lists, st.floats(0, 1))
def test_is_within_one_jump_of_the_best(curves, share):
    """What a hollow stretch makes it miss is at most the largest jump's worth of weights."""
    least, whole = (sum(sum(o[end][1] for o in [options(c)]) for c in curves) for end in (0, -1))
    budget = least + int(share * (whole - least))
    found = allocate(curves, budget)
    jump = max(options(c)[-1][1] - options(c)[0][1] for c in curves)
    assert cheapest(curves, budget) <= found.cost + 1e-9
    if budget - jump >= least:
        assert found.cost <= cheapest(curves, budget - jump) + 1e-9


@settings(deadline=None)
@given(curve_lists, st.floats(0, 1))
def test_keeps_the_budget_and_leaves_nothing_that_fits(curves, share):
    least, whole = (sum(options(c)[end][1] for c in curves) for end in (0, -1))
    assert least == sum(min(curve.prices("weights")) for curve in curves)
    budget = least + int(share * (whole - least))
    found = allocate(curves, budget)
    chosen = []
    for curve, choice in zip(curves, found.choices, strict=True):
        (at,) = [i for i, o in enumerate(options(curve)) if o[0] == choice.size]
        chosen.append((curve, at))
    assert found.weights == sum(options(c)[at][1] for c, at in chosen) <= budget
    assert found.cost == pytest.approx(sum(options(c)[at][2] for c, at in chosen), abs=1e-9)
    left = budget - found.weights
    for curve, at in chosen:
        larger = options(curve)[at + 1 :]
        assert not larger or larger[0][1] - options(curve)[at][1] > left


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ((0.8, 0.6, 0.4), 0.2),  # in proportion to what is removed
        ((6.4, 3.6, 1.6), 0.4),  # with its square
        ((0.64, 0.6, 0.6), 0.3),  # slower than in proportion, which is the least
        ((6.4, 0.1, -0.1), 0.0),  # free as far as can be seen
    ],
)
def test_near_full_size_costs_grow_as_they_do_at_the_largest_sizes(costs, expected):
    only = offer((2, 4, 6), costs, 10, 1, 10, range(2, 11))
    assert allocate([only], 8).cost == pytest.approx(expected)


def test_the_whole_budget_keeps_everything_and_the_least_the_smallest_sizes():
    curves = [quadratic(0, 1.0), quadratic(1, 0.3)]
    assert sizes(allocate(curves, 48)) == (6, 6)
    assert allocate(curves, 10**9).cost == 0
    assert sizes(allocate(curves, 8)) == (1, 1)
    with pytest.raises(AssertionError, match="below the smallest"):
        allocate(curves, 7)


def test_the_fine_grained_take_up_what_coarse_steps_leave():
    eights = [quadratic(i, 1.0, full=32, unit=100) for i in range(3)]
    coarse = [replace(o, choices=tuple(c for c in o.choices if c.width % 8 == 0)) for o in eights]
    fine = quadratic(3, 1e-6, full=2000, unit=1)
    found = allocate([*coarse, fine], 7654)
    assert found.weights == 7654
    assert all(choice.width % 8 == 0 for choice in found.choices[:3])


def test_a_jump_over_a_hollow_stretch_is_seen():
    """Nothing is saved until all of the second is kept; looking one step ahead would never go there."""
    flat = offer((1, 2, 3), (5.0, 5.0, 5.0), 4, 10, 40, (1, 2, 3, 4))
    steady = quadratic(1, 0.01, full=4, unit=10)
    assert sizes(allocate([steady, flat], 50)) == (1, 4)


def test_a_budget_of_bytes_is_spent_on_bytes():
    """Sizes that keep many weights in few bytes are bought where bytes are short, others where weights are."""
    plain, packed = quadratic(0, 1.0, full=4), quadratic(1, 1.0, full=4)
    packed = replace(packed, choices=tuple(replace(c, bytes=c.weights // 4) for c in packed.choices))
    by_weights, by_bytes = allocate([plain, packed], 20), allocate([plain, packed], 20, "bytes")
    assert by_weights.choices[0].weights + by_weights.choices[1].weights == by_weights.taken == 20
    assert by_bytes.taken == sum(choice.bytes for choice in by_bytes.choices) <= 20
    assert by_bytes.choices[1].size == 4
    assert by_bytes.weights > by_bytes.taken


def test_of_choices_that_take_the_same_the_one_of_most_weights_is_bought():
    curve = Curve(0, "mlp", ((1, 4), (2, 3)), (4, 6), (2.0, 1.0), (4, 4), 16, 16)
    whole = Choice((4, 4), 16, 32, 4)
    choices = (Choice((2, 3), 6, 8, 4), Choice((1, 4), 4, 8, 4), whole)
    found = allocate([Offer(curve, choices, whole)], 8, "bytes")
    assert (found.choices[0].size, found.cost) == ((2, 3), pytest.approx(1.0))


def test_a_large_model_is_allocated_in_seconds():
    draw = random.Random(0)
    curves = []
    for layer, (target, full, unit) in itertools.product(
        range(32), [("qk", 128, 8192), ("ov", 128, 8192), ("mlp", 11008, 12288)]
    ):
        measured = [int(full * f) for f in (0.3, 0.45, 0.6, 0.75, 0.9)]
        nats = [draw.uniform(0.1, 1) * (1 - n / full) ** 2 for n in measured]
        choices = range(measured[0], full + 1)
        curves.append(offer(measured, nats, full, unit, full * unit, choices, (layer, target)))
    whole = sum(curve.whole.weights for curve in curves)
    for keep in (0.9, 0.7, 0.5):
        start = time.perf_counter()
        found = allocate(curves, int(keep * whole))
        assert time.perf_counter() - start < 5
        assert 0.9999 * keep < found.weights / whole <= keep
